"""What acting banks and working sets do to a model's predictions, as a file that lies beside the model."""
