"""Where it runs: the `gpt4image` command, the doctor, the demo, and jobs on a Ray cluster."""
