"""What each notebook must not lose unnoticed."""

# After a change that is meant: python scripts/course.py pins > tests/pins.py
COLUMNS = (
    "asserts",
    "compares",
    "claims",
    "not_compared",
    "images",
    "least_bytes",
    "least_width",
    "least_height",
)
PINS = {
    "00_start_here": (2, 1, 0, 3, 3, 38950, 677, 392),
    "01_dense_ffn": (4, 7, 11, 7, 9, 15602, 606, 203),
    "02_experts_and_router": (2, 5, 0, 6, 12, 24471, 522, 282),
    "03_routing_strategies": (0, 7, 0, 2, 14, 29453, 575, 268),
    "04_dispatch": (2, 3, 6, 4, 10, 24089, 554, 338),
    "05_capacity": (1, 11, 0, 1, 9, 27501, 685, 258),
    "06_load_balancing": (0, 7, 0, 9, 8, 25744, 554, 268),
    "07_train_language_model": (2, 8, 2, 3, 6, 28696, 743, 319),
    "08_specialisation": (0, 3, 0, 6, 13, 18377, 522, 162),
    "09_beyond_language": (0, 6, 0, 12, 10, 20086, 522, 268),
    "10_published_models": (6, 8, 0, 1, 8, 16709, 567, 225),
    "11_dense_or_moe": (3, 5, 7, 6, 7, 26660, 743, 313),
}
