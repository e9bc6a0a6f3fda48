import sys

from support.pages.write import main

sys.exit(main())
