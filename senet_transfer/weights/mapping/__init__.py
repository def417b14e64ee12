"""From a file to a model, tensor by tensor."""
