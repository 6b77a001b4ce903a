"""Two ways in, grpc/ and http/, to one orchestrator."""
