import sys

from support.compatibility.page import main

sys.exit(main())
