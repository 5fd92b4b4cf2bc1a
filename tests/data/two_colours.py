"""The captions of seven images, each red on the left and blue on the right."""

RED, BLUE, WHITE = (255, 0, 0), (0, 0, 255), (255, 255, 255)
TEXTS = ["a flag", "two halves", "a flag", ["red and blue", "blue and red"], "five", "six", "seven"]
