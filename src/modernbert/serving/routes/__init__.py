"""The routes of the server, one file an API."""
