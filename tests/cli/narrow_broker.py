"""`python -m tests.cli.narrow_broker WORD CONFIG`: the embedded broker with a rule too few: nobody may write to topics with this word."""

import sys

from broker_server import embedded_broker

if __name__ == "__main__":
    word = sys.argv.pop(1)
    may_write = embedded_broker.may_write
    embedded_broker.may_write = lambda user, topic: word not in topic and may_write(user, topic)
    sys.exit(embedded_broker.main())
