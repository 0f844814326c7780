"""Several processes: rendezvous, FSDP2 ranks, weight transfer."""
