from tests.speed.bench import main

main()
