"""What a network costs, what its gates do, and which variant of SE is best on one's own data."""
