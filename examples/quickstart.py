"""The whole road in Python: a named network on real digits, trained with branches, stripped, exported, verified."""

import okdc

result = okdc.compress("resnet18", recipe="digits/resnet18-ahbf", method="ahbf", epochs=1)

print(f"top-1 {result.metrics['top1']:.1f} %, report in {result.path / 'report.html'}")
for row in result.verification["rows"]:
    print(row["name"], row["top1"], "ships" if row["pass"] else row["reason"])
