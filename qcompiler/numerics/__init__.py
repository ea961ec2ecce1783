"""What every `qc.*` operator means, in numpy alone."""
