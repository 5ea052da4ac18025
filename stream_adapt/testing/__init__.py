"""What we test with, shipped, so that users can test with it, too: `pip install 'stream-adapt[testing]'`.

broker      pytest fixtures that hand out a real Apache Kafka, topics of one's own, and a fault proxy
proxy       the fault proxy: requests and answers that come late, never or wrong, and connections that fail
scripted    Kafka in memory under the real loop, with crashes as data
clocks      a clock to set, and to make jump
wire        as much of Kafka's wire protocol as the proxy needs
security    a broker with passwords, certificates and permissions
model       a model without training: right in form, random in content
"""
