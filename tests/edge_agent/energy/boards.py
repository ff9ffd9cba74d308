"""Trees of sysfs as real boards show them, and what they draw: the double of every sensor."""

from __future__ import annotations

import re
from pathlib import Path

PI_FLAGS = "sys/devices/platform/soc/soc:firmware/get_throttled"
# What `vcgencmd pmic_read_adc` prints on a Pi 5 at rest.
PMIC = """\
 3V7_WL_SW_A current(0)=0.09759000A
   3V3_SYS_A current(1)=0.06441132A
   1V8_SYS_A current(2)=0.16980680A
  DDR_VDD2_A current(3)=0.01757800A
  DDR_VDDQ_A current(4)=0.00000000A
   1V1_SYS_A current(5)=0.18639750A
    0V8_SW_A current(6)=0.35327870A
  VDD_CORE_A current(7)=0.73797000A
   3V3_DAC_A current(17)=0.00000000A
   3V3_ADC_A current(18)=0.00012210A
   0V8_AON_A current(16)=0.00439560A
      HDMI_A current(22)=0.01465180A
 3V7_WL_SW_V volt(8)=3.70486700V
   3V3_SYS_V volt(9)=3.31189100V
   1V8_SYS_V volt(10)=1.80036700V
  DDR_VDD2_V volt(11)=1.11205100V
  DDR_VDDQ_V volt(12)=0.61172800V
   1V1_SYS_V volt(13)=1.10915200V
    0V8_SW_V volt(14)=0.80219800V
  VDD_CORE_V volt(15)=0.72007340V
   3V3_DAC_V volt(20)=3.30835400V
   3V3_ADC_V volt(21)=3.30683700V
   0V8_AON_V volt(19)=0.80063400V
      HDMI_V volt(23)=5.08252000V
     EXT5V_V volt(24)=5.07616000V
      BATT_V volt(25)=0.00000000V
"""


def write(root: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    return root


def ina3221(address: str, hwmon: str, rails: list[tuple[str, int, int]]) -> dict[str, str]:
    """One chip: (label, mV, mA) of its channels, and the shunt voltages that the driver shows beside them."""
    folder = f"sys/bus/i2c/drivers/ina3221/{address}/hwmon/{hwmon}"
    files = {f"{folder}/name": "ina3221\n", f"{folder}/in7_label": "sum of shunt voltages\n"}
    for channel, (label, millivolts, milliamps) in enumerate(rails, 1):
        files |= {
            f"{folder}/in{channel}_label": f"{label}\n",
            f"{folder}/in{channel}_input": f"{millivolts}\n",
            f"{folder}/curr{channel}_input": f"{milliamps}\n",
            f"{folder}/in{channel + 3}_input": "4\n",
        }
    return files


ORIN_NANO = ina3221("1-0040", "hwmon3", [("VDD_IN", 5032, 976), ("VDD_CPU_GPU_CV", 5032, 144), ("VDD_SOC", 5032, 288)])
AGX_ORIN = ina3221("1-0040", "hwmon3", [("VDD_GPU_SOC", 19_000, 130), ("VDD_CPU_CV", 19_000, 40), ("VIN_SYS_5V0", 5032, 600)]) | ina3221(
    "1-0041", "hwmon4", [("NC", 0, 0), ("VDDQ_VDD2_1V8AO", 5032, 100), ("NC", 0, 0)]
)
AGX_XAVIER = ina3221("1-0040", "hwmon3", [("GPU", 19_000, 20), ("CPU", 19_000, 30), ("SOC", 19_000, 50)]) | ina3221(
    "1-0041", "hwmon4", [("CV", 19_000, 0), ("VDDRQ", 19_000, 10), ("SYS5V", 5000, 400)]
)
NANO = ina3221("6-0040", "hwmon0", [("POM_5V_IN", 5000, 500), ("POM_5V_GPU", 5000, 20), ("POM_5V_CPU", 5000, 110)])
ZERO_WITH_INA219 = {
    "sys/class/hwmon/hwmon0/name": "cpu_thermal\n",
    "sys/class/hwmon/hwmon2/name": "ina219\n",
    "sys/class/hwmon/hwmon2/in0_input": "21\n",
    "sys/class/hwmon/hwmon2/in1_input": "5108\n",
    "sys/class/hwmon/hwmon2/curr1_input": "212\n",
    "sys/class/hwmon/hwmon2/power1_input": "1080000\n",
    "sys/class/hwmon/hwmon2/shunt_resistor": "100000\n",
}
LAPTOP = {
    "sys/class/powercap/intel-rapl:0/name": "package-0\n",
    "sys/class/powercap/intel-rapl:0/energy_uj": "262143000000\n",
    "sys/class/powercap/intel-rapl:0/max_energy_range_uj": "262143328850\n",
    "sys/class/powercap/intel-rapl:0:0/name": "core\n",
    "sys/class/powercap/intel-rapl:0:0/energy_uj": "131000000000\n",
    "sys/class/powercap/intel-rapl:0:0/max_energy_range_uj": "262143328850\n",
    "sys/class/powercap/intel-rapl:1/name": "psys\n",
    "sys/class/powercap/intel-rapl:1/energy_uj": "99000000000\n",
    "sys/class/powercap/intel-rapl:1/max_energy_range_uj": "262143328850\n",
}
BATTERY = {
    "sys/class/power_supply/AC/type": "Mains\n",
    "sys/class/power_supply/AC/online": "0\n",
    "sys/class/power_supply/BAT0/type": "Battery\n",
    "sys/class/power_supply/BAT0/status": "Discharging\n",
    "sys/class/power_supply/BAT0/voltage_now": "11400000\n",
    "sys/class/power_supply/BAT0/current_now": "850000\n",
    "sys/class/power_supply/hidpp_battery_0/type": "Battery\n",
    "sys/class/power_supply/hidpp_battery_0/scope": "Device\n",
    "sys/class/power_supply/hidpp_battery_0/status": "Discharging\n",
    "sys/class/power_supply/hidpp_battery_0/voltage_now": "3900000\n",
}
HEAT = {
    "sys/class/thermal/thermal_zone0/type": "cpu-thermal\n",
    "sys/class/thermal/thermal_zone0/temp": "52100\n",
    "sys/class/thermal/thermal_zone1/type": "gpu-thermal\n",
    "sys/class/thermal/thermal_zone1/temp": "49500\n",
    "sys/class/thermal/cooling_device0/type": "pwm-fan\n",
    "sys/class/thermal/cooling_device0/cur_state": "2\n",
}


def pmic_watts() -> float:
    """By another way than the meter's: the lines in pairs."""
    amps = dict(re.findall(r"(\w+)_A current\(\d+\)=([\d.]+)A", PMIC))
    volts = dict(re.findall(r"(\w+)_V volt\(\d+\)=([\d.]+)V", PMIC))
    return sum(float(amps[rail]) * float(volts[rail]) for rail in amps)
