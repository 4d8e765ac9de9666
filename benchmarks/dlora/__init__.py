"""DLoRA: what Kill and Revive saves (kill_and_revive), what crosses (bytes), and jobs over a real link (network)."""
