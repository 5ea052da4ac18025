"""Kafka: the consumer, the producer and its transactions, topics, and an Apache Kafka to try things on."""
