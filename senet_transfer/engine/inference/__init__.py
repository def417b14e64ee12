"""What is done with a trained model: prediction on images and evaluation."""
