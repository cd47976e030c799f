"""What a machine can run and how long it takes, told before anything runs: from settings, without weights."""
