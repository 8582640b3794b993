"""Devices: what a npu, a cuda GPU and a cpu are called, talk and measure."""

from internlm_lib.devices.base import Device, Memory, select_device

__all__ = ["Device", "Memory", "select_device"]
