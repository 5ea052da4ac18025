"""The learner: encoder, feedback levels and update rules. Knows nothing of Kafka."""
