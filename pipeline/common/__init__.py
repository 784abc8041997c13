"""What all other packages of the pipeline use."""
