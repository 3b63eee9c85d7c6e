"""Messages and images of a request, as a model's processor wants them."""
