"`python -m ddpo_scratch`, which launchers can start: the command `ddpo_train`."
from .command.door import main

if __name__ == "__main__":
    main()
