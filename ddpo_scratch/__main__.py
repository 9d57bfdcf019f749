"`python -m ddpo_scratch`, which launchers can start: the command `ddpo_train`."
from .door import main

if __name__ == "__main__":
    main()
