// What a kernel's launches are as data, and what runs them: see backends/triton/program.py.
//
// Nothing here knows what a kernel computes.

#pragma once

#include <torch/csrc/autograd/python_variable.h>

#include <ATen/Context.h>
#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_strided.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>
#include <c10/core/impl/LocalDispatchKeySet.h>

#include <array>
#include <atomic>
#include <memory>
#include <mutex>
#include <vector>

namespace fastattn {

using at::Tensor;

// What an address is of: the tensors of a `Call` in order, then what a forward makes, then a backward's.
enum Source : int {
  kQ, kK, kV, kMask, kLo, kHi, kSinks, kQLengths, kKvLengths, kSegments,
  kOut, kLse, kGradOut, kGradQ, kGradK, kGradV, kGradMask, kGradSinks, kMemory, kSources
};
constexpr int kInputs = 10;
constexpr uintptr_t kAlignment = 16;

using Tensors = std::array<Tensor, kSources>;
using Key = std::vector<int64_t>;

inline uintptr_t address_of(const Tensor& x) {
  return reinterpret_cast<uintptr_t>(x.const_data_ptr());
}

// Whether nobody sees what torch does with tensors: no mode, no transform, no tracer.
inline bool unwatched() {
  return (c10::impl::tls_local_dispatch_key_set().included_ - c10::default_included_set).empty();
}

// Everything of a tensor that is not data.
inline void append(Key& key, const Tensor& x, bool gradient) {
  const auto* impl = x.unsafeGetTensorImpl();
  const auto device = impl->device();
  key.push_back(
      x.dim() | (int64_t(device.type()) << 8) | (int64_t(uint8_t(device.index())) << 16) |
      (int64_t(x.scalar_type()) << 24) | (int64_t(gradient) << 32));
  key.push_back(int64_t(impl->key_set().raw_repr()));
  for (const auto n : impl->sizes()) key.push_back(n);
  for (const auto n : impl->strides()) key.push_back(n);
}

struct KeyHash {
  size_t operator()(const Key& key) const {
    uint64_t found = key.size();
    for (const auto x : key) found = (found ^ uint64_t(x)) * 0x9E3779B97F4A7C15ull, found ^= found >> 29;
    return found;
  }
};

// Whether objects of Python's may still be given up: a thread that asks an interpreter which ends for its lock is ended,
// in a destructor with the whole process.
inline bool python_runs() {
#if PY_VERSION_HEX >= 0x030D0000
  return Py_IsInitialized() && !Py_IsFinalizing();
#else
  return Py_IsInitialized() && !_Py_IsFinalizing();
#endif
}

// A reference to an object of Python's that may be given up by a thread without the interpreter's lock.
struct Held {
  PyObject* object;
  explicit Held(PyObject* x) : object(x) { Py_XINCREF(x); }
  Held(const Held&) = delete;
  Held& operator=(const Held&) = delete;
  ~Held() {
    if (!python_runs()) return;
    const auto state = PyGILState_Ensure();
    Py_XDECREF(object);
    PyGILState_Release(state);
  }
};

using LaunchFunction = int (*)(const void*, void*, void**, void**);
using GetContext = int (*)(void**);
using SetContext = int (*)(void*);
using IsCapturing = int (*)(void*, int*);

inline LaunchFunction launch_kernel = nullptr;
inline GetContext get_context = nullptr;
inline SetContext set_context = nullptr;
inline IsCapturing is_capturing = nullptr;

inline std::atomic<int64_t> generation{0};

struct Given {
  int source;
  bool aligned;
  Key layout;  // empty: the look-up has compared it
};

struct Made {
  int source;
  std::vector<int64_t> sizes, strides;
  at::ScalarType dtype;
};

struct Write {
  uint64_t* at;
  int source;
  int64_t offset;  // bytes
};

struct Launch {
  const void* config;
  uint64_t* stream;  // where the config has it
  void* function;
  void** arguments;
};

struct Program {
  at::Device device{at::kCPU};
  void* context = nullptr;
  int64_t memory = 0;  // bytes
  bool apart = false;  // the values must not begin where the keys do
  bool counts = false;  // it has counters: for one thread and one stream, and no graph that is captured
  unsigned long thread = 0;
  void* stream = nullptr;
  std::vector<Given> given;
  std::vector<Made> made;
  std::vector<Write> writes;
  std::vector<Launch> launches;
  std::unique_ptr<Held> memory_of_arguments;
  std::atomic<int64_t>* served = nullptr;
  std::mutex lock;  // of the memory of arguments

  bool fits(const Tensors& tensors) const {
    thread_local Key found;
    for (const auto& x : given) {
      const auto& tensor = tensors[x.source];
      if (!tensor.defined()) return false;
      if (!x.layout.empty()) {  // first: what lies otherwise may have no address
        found.clear();
        append(found, tensor, false);
        if (found != x.layout) return false;
      }
      if (x.aligned && address_of(tensor) % kAlignment) return false;
    }
    return !apart || address_of(tensors[kK]) != address_of(tensors[kV]);
  }

  static bool captured(void* stream) {
    int status = 0;
    return stream != nullptr && (is_capturing(stream, &status) || status);  // (the default stream never is)
  }

  // Allocates and launches. False where it did not, or may not.
  bool run(Tensors& tensors, bool waits) {
    if (at::globalContext().deterministicAlgorithms()) return false;  // torch would fill what is allocated
    void* stream = nullptr;
    if (device.is_cuda()) {
      const auto* guard = c10::impl::getDeviceGuardImpl(device.type());
      if (guard->getDevice() != device) return false;
      stream = guard->getStreamNativeHandle(guard->getStream(device));
      void* current = nullptr;
      if (get_context(&current) || (current == nullptr && set_context(context))) return false;
    }
    if (counts && (stream != this->stream || PyThread_get_thread_ident() != thread || captured(stream))) return false;
    std::unique_lock<std::mutex> held(lock, std::defer_lock);
    if (waits) {
      held.lock();
    } else if (!held.try_lock()) {
      return false;
    }
    at::AutoDispatchBelowADInplaceOrView below;
    const auto options = at::TensorOptions().device(device);
    for (const auto& x : made) tensors[x.source] = at::empty_strided(x.sizes, x.strides, options.dtype(x.dtype));
    if (memory) tensors[kMemory] = at::empty({memory}, options.dtype(at::kByte));
    std::array<uintptr_t, kSources> addresses{};
    for (int i = 0; i < kSources; ++i) {
      if (tensors[i].defined()) addresses[i] = address_of(tensors[i]);
    }
    for (const auto& x : writes) *x.at = addresses[x.source] + x.offset;
    for (const auto& x : launches) {
      *x.stream = reinterpret_cast<uint64_t>(stream);
      if (launch_kernel(x.config, x.function, x.arguments, nullptr)) return false;
    }
    tensors[kMemory].reset();
    served->fetch_add(1, std::memory_order_relaxed);
    return true;
  }
};

}  // namespace fastattn
