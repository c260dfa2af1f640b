"""The mathematics of measures, apart from their declarations: these need torch."""
