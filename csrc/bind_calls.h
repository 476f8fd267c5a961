// Around the kernels of a call: Python's signals and the floating-point environment.
#pragma once
#include <pybind11/pybind11.h>

#include <cstring>
#include <stdexcept>
#include <string_view>

#include "cpu/common/fp_environment.h"
#include "interrupt.h"

namespace fastvq {

namespace py = pybind11;

// Signal handlers run in Python's main thread alone.
inline unsigned long& main_thread() {
  static unsigned long identity = 0;
  return identity;
}

// Runs the handlers of pending signals. Returns whether one of them raised (Ctrl-C: KeyboardInterrupt). The exception
// stays set in this thread until the call returns to Python.
inline bool python_interrupted() {
  if (PyThread_get_thread_ident() != main_thread()) return false;
  const PyGILState_STATE state = PyGILState_Ensure();
  const bool raised = PyErr_CheckSignals() != 0;
  PyGILState_Release(state);
  return raised;
}

inline void bind_calls(py::module_& m) {
  set_interrupt_check(&python_interrupted);
  py::register_local_exception_translator([](std::exception_ptr thrown) {
    try {
      if (thrown) std::rethrow_exception(thrown);
    } catch (const Interrupted&) {
      if (!PyErr_Occurred()) PyErr_SetNone(PyExc_KeyboardInterrupt);
    }
  });
  m.def("set_main_thread", [](unsigned long identity) { main_thread() = identity; });
  // Sets the default floating-point environment; leave_call restores the one that enter_call returned.
  m.def("enter_call", [] {
    begin_call();
    const DefaultFloatingPoint::Saved saved = DefaultFloatingPoint::enter();
    return py::bytes(reinterpret_cast<const char*>(&saved), sizeof saved);
  });
  m.def("leave_call", [](const py::bytes& bytes) {
    DefaultFloatingPoint::Saved saved;
    const std::string_view view = bytes;
    if (view.size() != sizeof saved) throw std::invalid_argument("fastvq: leave_call takes what enter_call returned");
    std::memcpy(&saved, view.data(), sizeof saved);
    DefaultFloatingPoint::leave(saved);
  });
}

}  // namespace fastvq
