"""What frozen tokens know; each file is one probe, or what probes share."""
