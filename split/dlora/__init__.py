"""DLoRA: the frozen backbone at the coordinator, everything that is trained on the devices (Gao and Zhang 2024)."""
