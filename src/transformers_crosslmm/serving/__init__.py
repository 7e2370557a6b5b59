"""Many people, many videos: the HTTP server and the corpus runner."""
