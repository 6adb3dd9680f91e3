"""gradflow inside other tools; each module sleeps until its tool asks for it."""
