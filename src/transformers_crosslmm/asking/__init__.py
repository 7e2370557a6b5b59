"""Questions of one user about one video: conversations, pictures of the sampled frames, and the web page."""
