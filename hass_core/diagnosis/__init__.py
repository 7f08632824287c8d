"""Why a draft is accepted less than it could be: each cause with the number it contributes."""
