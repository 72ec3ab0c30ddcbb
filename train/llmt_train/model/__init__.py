"""The model that trains: where it comes from, what is changed of it, what is proved of it."""
