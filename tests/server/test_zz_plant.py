from tests.server.test_fuzz import *
from tests.server.conftest import *
def test_x(short):
    import tests.server.test_fuzz as f
    print("GROWTH", run(short, 10000))
