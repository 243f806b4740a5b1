"""Export a trained run to formats that other libraries load."""
