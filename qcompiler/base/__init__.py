"""What every stage stands on: errors, targets, atomic files, progress. Imports nothing of ours."""
