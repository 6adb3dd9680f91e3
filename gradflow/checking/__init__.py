"""What ``gradflow check`` does: a plan from three layers of settings, the runs, and what they come to."""
