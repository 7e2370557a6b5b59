"""`crosslmm serve` for an hour: good, bad and hostile requests without a pause, on one server, on loopback.

    python benchmarks/serving_soak.py                # -> benchmarks/serving_soak.json; an hour on one core
    python benchmarks/serving_soak.py --minutes 2    # a try, which writes nothing

The cases are those of `serving_load.py` and what strangers send besides: servers that drip, requests that are costly
to parse, numbers at the ends of their ranges, bodies that never arrive. Clients draw among them without end. Every
good answer is compared with what `generate` writes without the server, every other reply with the status that it must
get.
Once a minute the server's memory, open files and threads are written down; in the end nothing may be at
work.
"""

import argparse
import json
import random
import socket
import sys
import tempfile
import threading
import time
from pathlib import Path

from serving_load import (
    Case,
    Client,
    about,
    bad_cases,
    chat,
    good_cases,
    hostile_cases,
    make_case,
    make_videos,
    memory_mb,
    served,
)

RESULTS = Path(__file__).with_name("serving_soak.json")
AT_ONCE = 20
SHARES = {"good": 60, "bad": 15, "hostile": 25}
KEPT_WRONG = 20


def drip(listening: socket.socket) -> None:
    """Answers every connection with the head of a video and then a byte a second, for as long as it is open."""

    def answer(connection: socket.socket) -> None:
        with connection:
            try:
                connection.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 1000000\r\n\r\n")
                while True:
                    connection.sendall(b"x")
                    time.sleep(1)
            except OSError:
                return

    while True:
        threading.Thread(target=answer, args=(listening.accept()[0],), daemon=True).start()


def strangers_cases(video: str, dripping: str) -> list[Case]:
    zeros = b'{"messages": [' + b"0," * 2_500_000 + b"0]}"
    bodies = {
        "gone from a server that drips": (chat("What?", dripping), None),
        "costly to parse": (zeros[:1_000_000] + b"0]}", (400, 413)),
        "five megabytes of zeros": (zeros, (400, 413)),
        "deeply nested": (b'{"messages": ' + b"[" * 100_000 + b"]" * 100_000 + b"}", 400),
        "a tiny temperature": (chat("Why?", video, temperature=1e-40), 200),
        "a huge rate": (chat("Why?", video, chat_template_kwargs={"fps": 1e300}), 400),
        "the ends of all ranges": (chat("Why?", video, top_p=5e-324, seed=2**63 - 1, frequency_penalty=2), 200),
        "a link-local address": (chat("Fetch.", "http://[fe80::1%25lo]/a.mp4"), 400),
        "gone in the middle of a large request": (zeros, None),
    }
    return [make_case("hostile", name, *what) for name, what in bodies.items()]


def look(pid: int) -> dict:
    process = Path(f"/proc/{pid}")
    return {
        "open_files": len(list((process / "fd").iterdir())),
        "threads": len(list((process / "task").iterdir())),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--minutes", type=float, default=60.0)
    parser.add_argument("--keep", action="store_true", help="write the results of a shorter run too")
    given = parser.parse_args()
    listening = socket.create_server(("127.0.0.1", 0))
    threading.Thread(target=drip, args=(listening,), daemon=True).start()
    dripping = f"http://127.0.0.1:{listening.getsockname()[1]}/clip.mp4"
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        paths = make_videos(folder)
        hostile = [case for case in hostile_cases(folder) if "private" not in case.name]
        cases = {
            "good": good_cases(paths),
            "bad": bad_cases(str(paths[0])),
            "hostile": hostile + strangers_cases(str(paths[0]), dripping),
        }
        with served(folder, folder / "log", "--allow-private-urls", "--timeout", "900") as (process, port):
            clients = [Client(port, timeout=900) for _ in range(AT_ONCE)]
            began, samples = time.monotonic(), []
            end = began + 60 * given.minutes

            def work(number: int) -> None:
                draw = random.Random(number)
                while time.monotonic() < end:
                    [kind] = draw.choices(list(SHARES), list(SHARES.values()))
                    clients[number].send(draw.choice(cases[kind]))

            threads = [threading.Thread(target=work, args=(number,)) for number in range(AT_ONCE)]
            for thread in threads:
                thread.start()
            while any(thread.is_alive() for thread in threads):
                samples.append({"seconds": round(time.monotonic() - began), "memory_mb": memory_mb(process)})
                samples[-1] |= look(process.pid) | {"good_answers": sum(len(client.seconds) for client in clients)}
                for thread in threads:
                    thread.join(timeout=60 / AT_ONCE)
            for thread in threads:
                thread.join()
            idle_after = _idle_seconds(clients[0])
            log = (folder / "log").read_text()
    results = summary(clients, samples, log) | {"minutes": given.minutes, "seconds_until_idle": idle_after}
    results = {"about": about(cases) | {"command": " ".join(["python", *sys.argv])}} | results
    results["about"] |= {"requests": SHARES, "at_once": AT_ONCE}
    print(json.dumps({key: value for key, value in results.items() if key != "samples"}, indent=1))
    if given.keep or given.minutes >= 60:
        RESULTS.write_text(json.dumps(results, indent=1) + "\n")
    if results["wrong"]:
        sys.exit("Some requests did not get what they must; see `wrong`.")


def _idle_seconds(client: Client) -> float:
    """How long after the last request nothing is at work any more."""
    began = time.monotonic()
    while not client.is_idle():
        assert time.monotonic() - began < 60, "a place is kept"
        time.sleep(0.1)
    return round(time.monotonic() - began, 1)


def summary(clients: list[Client], samples: list[dict], log: str) -> dict:
    counts: dict[str, int] = {}
    for client in clients:
        for name, count in client.counts.items():
            counts[name] = counts.get(name, 0) + count
    seconds = sorted(second for client in clients for second in client.seconds)
    wrong = [one for client in clients for one in client.wrong]
    come_back = counts.pop("429", 0)
    half = len(samples) // 2
    return {
        "requests": sum(counts.values()),
        "good_answered_as_expected": len(seconds),
        "good_median_seconds": round(seconds[len(seconds) // 2], 2) if seconds else None,
        "told_to_come_back": come_back,
        "num_wrong": len(wrong),
        "wrong": wrong[:KEPT_WRONG],
        "memory_mb_first_half_max": max(sample["memory_mb"] for sample in samples[: half or 1]),
        "memory_mb_second_half_max": max(sample["memory_mb"] for sample in samples[half:]),
        "log_lines": len(log.splitlines()),
        "log_end": log[-1500:],
        "counts": dict(sorted(counts.items())),
        "samples": samples,
    }


if __name__ == "__main__":
    main()
