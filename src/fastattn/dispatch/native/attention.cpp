// Calls of a kind that came back, without Python: the key, the outputs, the launches and the link to the backward.
//
// The table is filled by calls.py, from what a call took that went through Python: a `Program` says which tensors to
// allocate, where in the memory of arguments each address goes, and what to launch then. Where anything is unusual the
// answer is None, and Python serves the call. Nothing here knows what a kernel computes.

#include <torch/csrc/autograd/python_variable.h>

#include <ATen/Context.h>
#include <ATen/autocast_mode.h>
#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_strided.h>
#include <c10/core/GradMode.h>
#include <c10/core/InferenceMode.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>
#include <c10/core/impl/LocalDispatchKeySet.h>
#include <torch/csrc/Exceptions.h>
#include <torch/csrc/autograd/function.h>
#include <torch/csrc/autograd/functions/utils.h>
#include <torch/csrc/autograd/saved_variable.h>
#include <torch/csrc/dynamo/compiled_autograd.h>
#include <torch/csrc/utils/object_ptr.h>

#include <algorithm>
#include <array>
#include <atomic>
#include <cstring>
#include <map>
#include <memory>
#include <mutex>
#include <string>
#include <type_traits>
#include <unordered_map>
#include <vector>

namespace {

using at::Tensor;
using torch::autograd::variable_list;

// What an address is of: the tensors of a `Call` in order, then what a forward makes, then a backward's.
enum Source : int {
  kQ, kK, kV, kMask, kLo, kHi, kSinks, kQLengths, kKvLengths, kSegments,
  kOut, kLse, kGradOut, kGradQ, kGradK, kGradV, kGradMask, kGradSinks, kMemory, kSources
};
constexpr int kInputs = 10;
constexpr uintptr_t kAlignment = 16;

using Tensors = std::array<Tensor, kSources>;
using Key = std::vector<int64_t>;

uintptr_t address_of(const Tensor& x) {
  return reinterpret_cast<uintptr_t>(x.const_data_ptr());
}

// Everything of a tensor that is not data.
void append(Key& key, const Tensor& x, bool gradient) {
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
bool python_runs() {
#if PY_VERSION_HEX >= 0x030D0000
  return Py_IsInitialized() && !Py_IsFinalizing();
#else
  return Py_IsInitialized() && !_Py_IsFinalizing();
#endif
}

// Python's error, to go on as an exception. The interpreter's lock must be held.
[[noreturn]] void throw_as_it_is() {
  python_error error;
  error.persist();  // or what runs until it is caught finds an error that is not its own
  throw error;
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

// ---- Programs -------------------------------------------------------------------------------------------------------

using LaunchFunction = int (*)(const void*, void*, void**, void**);
using GetContext = int (*)(void**);
using SetContext = int (*)(void*);
using IsCapturing = int (*)(void*, int*);

LaunchFunction launch_kernel = nullptr;
GetContext get_context = nullptr;
SetContext set_context = nullptr;
IsCapturing is_capturing = nullptr;
PyObject* gradients_of = nullptr;  // the way through Python: see calls.py
PyObject *intervals_type = nullptr, *segments_type = nullptr;  // of masks

std::atomic<int64_t> generation{0};

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

// What all calls of one key share.
std::atomic<uint64_t> bounds{0};

struct Bound {
  const uint64_t number = ++bounds;  // no other's, ever: an address may come back
  std::shared_ptr<Program> forward;
  std::vector<int> inputs;  // sources
  std::vector<int> wanted;  // of these with a gradient
  Held of, names, kind;  // eager.Bound; what the key has the addresses of
  double scale;
  int64_t generation;
  std::mutex lock;
  std::vector<std::shared_ptr<Program>> backwards;  // by the layout of the output's gradient

  Bound(PyObject* of, PyObject* names, PyObject* kind, double scale)
      : of(of), names(names), kind(kind), scale(scale), generation(::generation.load()) {}

  std::shared_ptr<Program> backward(const Tensors& tensors) {
    const std::lock_guard<std::mutex> held(lock);
    for (const auto& x : backwards) {
      if (x->fits(tensors)) return x;
    }
    return nullptr;
  }
};

int gradient_of(int source) {
  return source == kMask ? kGradMask : source == kSinks ? kGradSinks : kGradQ + source;
}

// Whether nobody sees what torch does with tensors: no mode, no transform, no tracer.
bool unwatched() {
  return (c10::impl::tls_local_dispatch_key_set().included_ - c10::default_included_set).empty();
}

// Whether autograd is where it usually is: not within an operator's implementation. (In torch 2.11 its engine excludes
// another key, of named tensors: this is not for a backward.)
bool outermost() {
  const auto usual = c10::InferenceMode::is_enabled() ? c10::default_excluded_set | c10::autograd_dispatch_keyset
                                                      : c10::default_excluded_set;
  return (c10::impl::tls_local_dispatch_key_set().excluded_ - usual).empty();
}

// ---- Autograd -------------------------------------------------------------------------------------------------------

#if __has_include(<torch/csrc/autograd/node.h>)  // torch 2.13: nodes count their own references
using NodePointer = c10::intrusive_ptr<torch::autograd::Node>;
#else
using NodePointer = std::shared_ptr<torch::autograd::Node>;
#endif

PyObject* wrapped(const Tensor& x) {
  if (!x.defined()) Py_RETURN_NONE;
  return THPVariable_Wrap(x);
}

struct FastattnBackward : torch::autograd::Node {
  std::shared_ptr<Bound> bound;
  std::vector<torch::autograd::SavedVariable> saved;  // the inputs, the output, the log-sum-exp

  std::string name() const override { return "FastattnBackward"; }

  void release_variables() override {
    const std::lock_guard<std::mutex> held(mutex_);
    for (auto& x : saved) x.reset_data();
  }

  // For a backward that torch's compiler traces ("compiled autograd"): Python shows it an operator.
  void compiled_args(torch::dynamo::autograd::CompiledNodeArgs& args) const override {
    args.collect(uint64_t(bound->number));
    for (size_t i = 0; i < saved.size(); ++i) args.collect(saved[i], i == bound->inputs.size());
  }

  variable_list apply_with_saved(
      const variable_list& grads, torch::dynamo::autograd::SwapSavedVariables& swapped) override {
    for (auto& x : saved) swapped.before(x);
    auto found = apply(variable_list(grads));
    for (auto& x : saved) swapped.after(x);
    return found;
  }

  variable_list apply(variable_list&& grads) override {
    variable_list found(bound->wanted.size());
    if (!grads[0].defined()) return found;
    Tensors tensors;
    {
      const std::lock_guard<std::mutex> held(mutex_);
      for (size_t i = 0; i < bound->inputs.size(); ++i) tensors[bound->inputs[i]] = saved[i].unpack();
      tensors[kOut] = saved[bound->inputs.size()].unpack(getptr());
      tensors[kLse] = saved[bound->inputs.size() + 1].unpack();
    }
    tensors[kGradOut] = grads[0];
    if (bound->generation == generation.load() && !c10::GradMode::is_enabled() && unwatched()) {
      if (launched(tensors)) {
        for (size_t i = 0; i < found.size(); ++i) found[i] = tensors[gradient_of(bound->wanted[i])];
        return found;
      }
    }
    through_python(tensors, found);
    return found;
  }

  bool launched(Tensors& tensors) const {
    try {
      const auto program = bound->backward(tensors);
      if (program != nullptr && program->run(tensors, true)) return true;
    } catch (const c10::Error&) {  // no memory, a sparse gradient: Python knows what to do
    }
    for (int i = kGradOut + 1; i < kSources; ++i) tensors[i].reset();  // Python makes its own, and may lack the room
    return false;
  }

  void through_python(const Tensors& tensors, variable_list& found) const {
    const pybind11::gil_scoped_acquire held;
    auto inputs = THPObjectPtr(PyTuple_New(kInputs));
    if (!inputs) throw_as_it_is();
    for (int i = 0; i < kInputs; ++i) PyTuple_SET_ITEM(inputs.get(), i, wrapped(tensors[i]));
    auto capsule = THPObjectPtr(PyCapsule_New(new std::shared_ptr<Bound>(bound), "fastattn.bound", [](PyObject* x) {
      delete static_cast<std::shared_ptr<Bound>*>(PyCapsule_GetPointer(x, "fastattn.bound"));
    }));
    auto result = THPObjectPtr(PyObject_CallFunction(
        gradients_of, "OdONNNN", bound->of.object, bound->scale, inputs.get(), wrapped(tensors[kOut]),
        wrapped(tensors[kLse]), wrapped(tensors[kGradOut]), capsule.release()));
    if (!result) throw_as_it_is();
    for (size_t i = 0; i < found.size(); ++i) {
      auto* x = PyTuple_GetItem(result.get(), bound->wanted[i] == kSinks ? 4 : bound->wanted[i]);
      if (x == nullptr) throw_as_it_is();
      if (x != Py_None) found[i] = THPVariable_Unpack(x);
    }
  }
};

void link(const std::shared_ptr<Bound>& bound, Tensors& tensors) {
  torch::autograd::edge_list edges;
  for (const auto i : bound->wanted) edges.push_back(torch::autograd::impl::gradient_edge(tensors[i]));
#if __has_include(<torch/csrc/autograd/node.h>)
  auto node = c10::make_intrusive<FastattnBackward>();
#else
  auto node = std::shared_ptr<FastattnBackward>(new FastattnBackward(), torch::autograd::deleteNode);
#endif
  node->bound = bound;
  node->set_next_edges(std::move(edges));
  torch::autograd::set_history(tensors[kOut], NodePointer(node));
  for (const auto i : bound->inputs) node->saved.emplace_back(tensors[i], false);
  node->saved.emplace_back(tensors[kOut], true);
  node->saved.emplace_back(tensors[kLse], false);
}

// ---- What Python calls ----------------------------------------------------------------------------------------------

// Both live for ever: threads of torch's may be at work while the process ends.
auto& table = *new std::unordered_map<Key, std::shared_ptr<Bound>, KeyHash>();  // under the interpreter's lock
auto& counters = *new std::map<std::string, std::unique_ptr<std::atomic<int64_t>>>();

bool is_tensor(PyObject* x) {
  const auto* type = reinterpret_cast<PyObject*>(Py_TYPE(x));
  return type == THPVariableClass || type == ParameterClass;
}

// Reads one of the arguments into its place, if it is a tensor or None. False where Python has to look at it.
bool take(PyObject* x, Tensors& tensors, int source, Key& key, bool grads) {
  if (x == Py_None) {
    key.push_back(0);
    return true;
  }
  if (!is_tensor(x)) return false;
  auto& tensor = tensors[source] = THPVariable_Unpack(x);
  if (tensor.unsafeGetTensorImpl()->has_symbolic_sizes_strides()) return false;
  if (torch::autograd::isFwGradDefined(tensor)) return false;
  append(key, tensor, grads && tensor.requires_grad());
  return true;
}

bool take_mask(PyObject* x, Tensors& tensors, Key& key, bool grads) {
  const auto* type = reinterpret_cast<PyObject*>(Py_TYPE(x));
  if (PyUnicode_CheckExact(x)) {
    key.push_back(1);
    return !PyUnicode_CompareWithASCIIString(x, "causal");
  }
  if (type == intervals_type) {
    key.push_back(2);
    return PyTuple_GET_SIZE(x) == 2 && take(PyTuple_GET_ITEM(x, 0), tensors, kLo, key, grads) &&
        take(PyTuple_GET_ITEM(x, 1), tensors, kHi, key, grads);
  }
  if (type == segments_type) {
    if (PyTuple_GET_SIZE(x) != 2) return false;
    auto* causal = PyTuple_GET_ITEM(x, 1);
    key.push_back(causal == Py_True ? 3 : 4);
    return PyBool_Check(causal) && take(PyTuple_GET_ITEM(x, 0), tensors, kSegments, key, grads);
  }
  return take(x, tensors, kMask, key, grads);
}

bool number(PyObject* x, Key& key) {  // a float or None
  int64_t bits = 0;
  if (x != Py_None) {
    if (!PyFloat_CheckExact(x)) return false;
    const double value = PyFloat_AS_DOUBLE(x);
    std::memcpy(&bits, &value, sizeof bits);
  }
  key.push_back(x != Py_None);
  key.push_back(bits);
  return true;
}

// arguments: those of `validation.Arguments`, in order; names, kind: objects that live as long as the entry.
bool read(PyObject* arguments, PyObject* scale, PyObject* names, PyObject* kind, Tensors& tensors, Key& key) {
  if (!PyTuple_CheckExact(arguments) || PyTuple_GET_SIZE(arguments) != 10) return false;
  const auto argument = [&](int i) { return PyTuple_GET_ITEM(arguments, i); };
  if (argument(9) != Py_False) return false;  // the log-sum-exp
  const bool grads = c10::GradMode::is_enabled();
  key.push_back(reinterpret_cast<int64_t>(names));
  key.push_back(reinterpret_cast<int64_t>(kind));
  for (int i = 0; i < 3; ++i) {
    if (argument(i) == Py_None || !take(argument(i), tensors, i, key, grads)) return false;
  }
  if (!take_mask(argument(3), tensors, key, grads)) return false;
  if (!take(argument(4), tensors, kSinks, key, grads)) return false;
  const auto* window = argument(5);
  key.push_back(window != Py_None);
  if (window != Py_None) {
    if (!PyTuple_CheckExact(window) || PyTuple_GET_SIZE(window) != 2) return false;
    for (int i = 0; i < 2; ++i) {
      auto* side = PyTuple_GET_ITEM(window, i);
      if (!PyLong_CheckExact(side)) return false;
      int overflow = 0;
      key.push_back(PyLong_AsLongLongAndOverflow(side, &overflow));
      if (overflow) return false;
    }
  }
  return number(argument(6), key) && take(argument(7), tensors, kQLengths, key, grads) &&
      take(argument(8), tensors, kKvLengths, key, grads) && number(scale, key);
}

// Autocast would cast the inputs, unless it casts to what they are.
bool would_be_cast(const Tensors& tensors) {
  const auto device = tensors[kQ].device().type();
  if (device == at::kMeta || !at::autocast::is_autocast_enabled(device)) return false;
  return at::autocast::get_autocast_dtype(device) != tensors[kQ].scalar_type();
}

PyObject* served(PyObject* const* arguments) {
  thread_local Key key;
  key.clear();
  Tensors tensors;
  if (table.empty() || !unwatched() || !outermost()) Py_RETURN_NONE;
  if (!read(arguments[0], arguments[1], arguments[2], arguments[3], tensors, key)) Py_RETURN_NONE;
  const auto at = table.find(key);
  if (at == table.end() || would_be_cast(tensors)) Py_RETURN_NONE;
  const auto bound = at->second;  // a copy: what is allocated may run Python, which may clear the table
  // A launch waits where the GPU has enough to do, an allocation for memory; what the GPU then waits for may be another
  // thread of Python. So, as in torch, not with the interpreter's lock.
  bool ran = false;
  auto* const state = PyEval_SaveThread();
  try {
    ran = bound->forward->fits(tensors) && bound->forward->run(tensors, false);
  } catch (const std::exception&) {  // no memory: Python knows what to do
  }
  PyEval_RestoreThread(state);
  if (!ran) Py_RETURN_NONE;
  if (!bound->wanted.empty()) link(bound, tensors);
  return THPVariable_Wrap(tensors[kOut]);
}

PyObject* py_attention(PyObject*, PyObject* const* arguments, Py_ssize_t count) {
  if (count != 4) {
    PyErr_SetString(PyExc_TypeError, "expected arguments, scale, names, kind");
    return nullptr;
  }
  try {
    return served(arguments);
  } catch (python_error& error) {
    error.restore();
    return nullptr;
  } catch (const std::exception&) {  // no memory, a sparse tensor: Python knows what to say
    Py_RETURN_NONE;
  }
}

template <class T>
T* pointer(PyObject* x) {
  return reinterpret_cast<T*>(PyLong_AsUnsignedLongLong(x));
}

std::vector<int64_t> integers(PyObject* x) {
  std::vector<int64_t> found(PyTuple_Size(x));
  for (size_t i = 0; i < found.size(); ++i) found[i] = PyLong_AsLongLong(PyTuple_GetItem(x, i));
  return found;
}

void delete_program(PyObject* x) {
  delete static_cast<std::shared_ptr<Program>*>(PyCapsule_GetPointer(x, "fastattn.program"));
}

// program(name, context, memory, apart, counts, stream, given, made, writes, launches, held) -> capsule
// given: (source, aligned, tensor or None) each; made: (source, tensor of that layout); writes: (address, source,
// offset); launches: (config, address of the stream, function, arguments).
PyObject* py_program(PyObject*, PyObject* arguments) {
  const char* name = nullptr;
  unsigned long long context = 0, stream = 0;
  long long memory = 0;
  int apart = 0, counts = 0;
  PyObject *given, *made, *writes, *launches, *held;
  if (!PyArg_ParseTuple(
          arguments, "sKLppKO!O!O!O!O", &name, &context, &memory, &apart, &counts, &stream, &PyTuple_Type, &given, &PyTuple_Type, &made,
          &PyTuple_Type, &writes, &PyTuple_Type, &launches, &held)) {
    return nullptr;
  }
  auto found = std::make_shared<Program>();
  found->context = reinterpret_cast<void*>(context);
  found->memory = memory;
  found->apart = apart;
  found->counts = counts;
  found->thread = PyThread_get_thread_ident();
  found->stream = reinterpret_cast<void*>(stream);
  for (Py_ssize_t i = 0; i < PyTuple_GET_SIZE(given); ++i) {
    int source = 0, aligned = 0;
    PyObject* tensor = nullptr;
    if (!PyArg_ParseTuple(PyTuple_GET_ITEM(given, i), "ipO", &source, &aligned, &tensor)) return nullptr;
    Given x{source, bool(aligned), {}};
    if (tensor != Py_None) append(x.layout, THPVariable_Unpack(tensor), false);
    found->given.push_back(std::move(x));
  }
  for (Py_ssize_t i = 0; i < PyTuple_GET_SIZE(made); ++i) {
    int source = 0;
    PyObject *sizes, *strides, *like;
    if (!PyArg_ParseTuple(PyTuple_GET_ITEM(made, i), "iO!O!O", &source, &PyTuple_Type, &sizes, &PyTuple_Type, &strides,
                          &like)) {
      return nullptr;
    }
    const auto& tensor = THPVariable_Unpack(like);
    found->made.push_back(Made{source, integers(sizes), integers(strides), tensor.scalar_type()});
    found->device = tensor.device();
  }
  for (Py_ssize_t i = 0; i < PyTuple_GET_SIZE(writes); ++i) {
    unsigned long long at = 0;
    int source = 0;
    long long offset = 0;
    if (!PyArg_ParseTuple(PyTuple_GET_ITEM(writes, i), "KiL", &at, &source, &offset)) return nullptr;
    found->writes.push_back(Write{reinterpret_cast<uint64_t*>(at), source, offset});
  }
  for (Py_ssize_t i = 0; i < PyTuple_GET_SIZE(launches); ++i) {
    unsigned long long config, stream, function, places;
    if (!PyArg_ParseTuple(PyTuple_GET_ITEM(launches, i), "KKKK", &config, &stream, &function, &places)) return nullptr;
    found->launches.push_back(Launch{
        reinterpret_cast<void*>(config), reinterpret_cast<uint64_t*>(stream), reinterpret_cast<void*>(function),
        reinterpret_cast<void**>(places)});
  }
  found->memory_of_arguments = std::make_unique<Held>(held);
  auto& counter = counters[name];
  if (counter == nullptr) counter = std::make_unique<std::atomic<int64_t>>(0);
  found->served = counter.get();
  return PyCapsule_New(new std::shared_ptr<Program>(std::move(found)), "fastattn.program", delete_program);
}

// remember(arguments, scale, names, kind, program, bound, scale of the call): the calls like this one run the program.
PyObject* py_remember(PyObject*, PyObject* arguments) {
  PyObject *of, *scale, *names, *kind, *program, *bound;
  double value = 0;
  if (!PyArg_ParseTuple(arguments, "OOOOOOd", &of, &scale, &names, &kind, &program, &bound, &value)) return nullptr;
  auto* found = static_cast<std::shared_ptr<Program>*>(PyCapsule_GetPointer(program, "fastattn.program"));
  if (found == nullptr) return nullptr;
  Key key;
  Tensors tensors;
  if (!read(of, scale, names, kind, tensors, key)) Py_RETURN_FALSE;
  auto entry = std::make_shared<Bound>(bound, names, kind, value);
  entry->forward = *found;
  const bool grads = c10::GradMode::is_enabled();
  for (int i = 0; i < kInputs; ++i) {
    if (!tensors[i].defined()) continue;
    if (tensors[i]._is_zerotensor()) Py_RETURN_FALSE;  // it has no memory
    entry->inputs.push_back(i);
    if (grads && tensors[i].requires_grad()) entry->wanted.push_back(i);
  }
  std::swap(table[std::move(key)], entry);  // the one before may run Python when it is dropped, which is here
  Py_RETURN_TRUE;
}

// remember_backward(capsule of the link's, program): gradients that lie as the program's `given` says run it.
PyObject* py_remember_backward(PyObject*, PyObject* arguments) {
  PyObject *capsule, *program;
  if (!PyArg_ParseTuple(arguments, "OO", &capsule, &program)) return nullptr;
  auto* bound = static_cast<std::shared_ptr<Bound>*>(PyCapsule_GetPointer(capsule, "fastattn.bound"));
  if (bound == nullptr) return nullptr;
  auto* found = static_cast<std::shared_ptr<Program>*>(PyCapsule_GetPointer(program, "fastattn.program"));
  if (found == nullptr) return nullptr;
  const std::lock_guard<std::mutex> held((*bound)->lock);
  auto& known = (*bound)->backwards;
  if (std::find(known.begin(), known.end(), *found) == known.end()) known.push_back(*found);
  Py_RETURN_NONE;
}

PyObject* py_backwards(PyObject*, PyObject* capsule) {
  auto* bound = static_cast<std::shared_ptr<Bound>*>(PyCapsule_GetPointer(capsule, "fastattn.bound"));
  if (bound == nullptr) return nullptr;
  const std::lock_guard<std::mutex> held((*bound)->lock);
  return PyLong_FromSize_t((*bound)->backwards.size());
}

PyObject* py_clear(PyObject*, PyObject*) {
  ++generation;
  std::remove_reference_t<decltype(table)> dropped;
  dropped.swap(table);  // what is dropped may run Python
  Py_RETURN_NONE;
}

PyObject* py_size(PyObject*, PyObject*) {
  return PyLong_FromSize_t(table.size());
}

PyObject* py_served(PyObject*, PyObject*) {
  auto found = THPObjectPtr(PyDict_New());
  if (!found) return nullptr;
  for (const auto& [name, count] : counters) {
    auto number = THPObjectPtr(PyLong_FromLongLong(count->load()));
    if (!number || PyDict_SetItemString(found.get(), name.c_str(), number.get())) return nullptr;
  }
  return found.release();
}

// setup(launch, get context, set context, is capturing, gradients, Intervals, Segments): addresses of the driver's functions, the way
// through Python, classes of masks.
PyObject* py_setup(PyObject*, PyObject* arguments) {
  unsigned long long launch, get, set, capturing;
  PyObject *gradients, *intervals, *segments;
  if (!PyArg_ParseTuple(arguments, "KKKKOOO", &launch, &get, &set, &capturing, &gradients, &intervals, &segments)) return nullptr;
  launch_kernel = reinterpret_cast<LaunchFunction>(launch);
  get_context = reinterpret_cast<GetContext>(get);
  set_context = reinterpret_cast<SetContext>(set);
  is_capturing = reinterpret_cast<IsCapturing>(capturing);
  Py_XSETREF(gradients_of, Py_NewRef(gradients));
  Py_XSETREF(intervals_type, Py_NewRef(intervals));
  Py_XSETREF(segments_type, Py_NewRef(segments));
  Py_RETURN_NONE;
}

PyMethodDef methods[] = {
    {"attention", reinterpret_cast<PyCFunction>(reinterpret_cast<void (*)()>(py_attention)), METH_FASTCALL, nullptr},
    {"program", py_program, METH_VARARGS, nullptr},
    {"remember", py_remember, METH_VARARGS, nullptr},
    {"remember_backward", py_remember_backward, METH_VARARGS, nullptr},
    {"backwards", py_backwards, METH_O, nullptr},
    {"clear", py_clear, METH_NOARGS, nullptr},
    {"size", py_size, METH_NOARGS, nullptr},
    {"served", py_served, METH_NOARGS, nullptr},
    {"setup", py_setup, METH_VARARGS, nullptr},
    {nullptr, nullptr, 0, nullptr}};

PyModuleDef definition = {PyModuleDef_HEAD_INIT, "fastattn_native", nullptr, -1, methods};

}  // namespace

PyMODINIT_FUNC PyInit_fastattn_native() {
  return PyModule_Create(&definition);
}
