"""One person, one video: conversations, pictures of what the model saw, and the web page."""
