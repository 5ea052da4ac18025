"""What we test with, shipped, so that users can test with it, too: `pip install 'stream-adapt[testing]'`.

broker      pytest fixtures that hand out a real Apache Kafka and topics of one's own
model       a model without training: right in form, random in content
"""
