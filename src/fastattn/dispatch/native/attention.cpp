// Calls of a kind that came back, without Python: the key, the outputs, the launches and the link to the backward.
//
// The table is filled by calls.py, from what a call took that went through Python. Where anything is unusual the answer
// is None, and Python serves the call.

#include "link.h"
#include "operators.h"

#include <ATen/autocast_mode.h>

#include <algorithm>
#include <cstring>
#include <map>
#include <type_traits>
#include <unordered_map>

namespace fastattn {
namespace {

PyObject *intervals_type = nullptr, *segments_type = nullptr;  // of masks

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
  if (!PyBool_Check(argument(9))) return false;
  const bool grads = c10::GradMode::is_enabled();
  key.push_back(argument(9) == Py_True);
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
  if (!bound->returns_lse) return THPVariable_Wrap(tensors[kOut]);
  auto out = THPObjectPtr(THPVariable_Wrap(tensors[kOut])), lse = THPObjectPtr(THPVariable_Wrap(tensors[kLse]));
  return out && lse ? PyTuple_Pack(2, out.get(), lse.get()) : nullptr;
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

std::vector<int64_t> integers(PyObject* x) {
  std::vector<int64_t> found(PyTuple_Size(x));
  for (size_t i = 0; i < found.size(); ++i) found[i] = PyLong_AsLongLong(PyTuple_GetItem(x, i));
  return found;
}

void delete_program(PyObject* x) {
  delete static_cast<std::shared_ptr<Program>*>(PyCapsule_GetPointer(x, "fastattn.program"));
}

// program(name, context, memory, apart, counts, stream, given, made, writes, launches, held) -> capsule
// given: (source, aligned, tensor or None) each; made: (source, sizes, strides, tensor of that dtype); writes:
// (address, source, offset); launches: (config, address of the stream, function, arguments).
PyObject* py_program(PyObject*, PyObject* arguments) {
  const char* name = nullptr;
  unsigned long long context = 0, stream = 0;
  long long memory = 0;
  int apart = 0, counts = 0;
  PyObject *given, *made, *writes, *launches, *held;
  if (!PyArg_ParseTuple(
          arguments, "sKLppKO!O!O!O!O", &name, &context, &memory, &apart, &counts, &stream, &PyTuple_Type, &given,
          &PyTuple_Type, &made, &PyTuple_Type, &writes, &PyTuple_Type, &launches, &held)) {
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
  entry->returns_lse = PyTuple_GET_ITEM(of, 9) == Py_True;
  if (entry->returns_lse && !entry->wanted.empty()) Py_RETURN_FALSE;  // the link knows one output
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

// One of an operator's arguments.
c10::IValue value_of(PyObject* x) {
  if (x == Py_None) return {};
  if (is_tensor(x)) return THPVariable_Unpack(x);
  if (PyBool_Check(x)) return x == Py_True;
  if (PyLong_CheckExact(x)) return int64_t(PyLong_AsLongLong(x));
  if (PyFloat_CheckExact(x)) return PyFloat_AS_DOUBLE(x);
  if (PyUnicode_CheckExact(x)) return std::string(PyUnicode_AsUTF8(x));
  throw std::invalid_argument("an argument of another type");
}

// remember_operator(number, arguments, program, empty): the calls of that operator that are like this one run the
// program. empty: (source, tensor like it) of each result that has no elements.
PyObject* py_remember_operator(PyObject*, PyObject* arguments) {
  int number = 0;
  PyObject *of, *program, *empty;
  if (!PyArg_ParseTuple(arguments, "iO!OO!", &number, &PyTuple_Type, &of, &program, &PyTuple_Type, &empty)) {
    return nullptr;
  }
  auto* found = static_cast<std::shared_ptr<Program>*>(PyCapsule_GetPointer(program, "fastattn.program"));
  if (found == nullptr) return nullptr;
  auto entry = std::make_shared<Entry>(Entry{*found, {}});
  for (Py_ssize_t i = 0; i < PyTuple_GET_SIZE(empty); ++i) {
    int source = 0;
    PyObject* like = nullptr;
    if (!PyArg_ParseTuple(PyTuple_GET_ITEM(empty, i), "iO", &source, &like)) return nullptr;
    const auto& tensor = THPVariable_Unpack(like);
    entry->empty.push_back(Made{source, tensor.sizes().vec(), tensor.strides().vec(), tensor.scalar_type()});
  }
  Key key;
  Tensors tensors;
  try {
    std::vector<c10::IValue> values;
    for (Py_ssize_t i = 0; i < PyTuple_GET_SIZE(of); ++i) values.push_back(value_of(PyTuple_GET_ITEM(of, i)));
    if (!read(*operators[number], values, tensors, key)) Py_RETURN_FALSE;
  } catch (const std::exception& error) {
    PyErr_SetString(PyExc_TypeError, error.what());
    return nullptr;
  }
  for (const auto& x : tensors) {
    if (x.defined() && x._is_zerotensor()) Py_RETURN_FALSE;  // it has no memory
  }
  try {
    enter_operators();
  } catch (const std::exception& error) {
    PyErr_SetString(PyExc_RuntimeError, error.what());
    return nullptr;
  }
  operators[number]->remember(std::move(key), std::move(entry));
  Py_RETURN_TRUE;
}

PyObject* py_clear(PyObject*, PyObject*) {
  ++generation;
  for (auto* x : operators) x->clear();
  std::remove_reference_t<decltype(table)> dropped;
  dropped.swap(table);  // what is dropped may run Python
  Py_RETURN_NONE;
}

// In a forked child: threads that are not there may hold locks, of programs too. Nothing of the parent's is used again;
// it stays allocated.
PyObject* py_renew(PyObject*, PyObject*) {
  ++generation;
  for (auto* x : operators) x->renew();
  new (&table) std::remove_reference_t<decltype(table)>;
  Py_RETURN_NONE;
}

PyObject* py_size(PyObject*, PyObject*) {
  size_t found = table.size();
  for (const auto* x : operators) found += x->size;
  return PyLong_FromSize_t(found);
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

// setup(launch, get context, set context, is capturing, gradients, Intervals, Segments): addresses of the driver's
// functions, the way through Python, classes of masks.
PyObject* py_setup(PyObject*, PyObject* arguments) {
  unsigned long long launch, get, set, capturing;
  PyObject *gradients, *intervals, *segments;
  if (!PyArg_ParseTuple(
          arguments, "KKKKOOO", &launch, &get, &set, &capturing, &gradients, &intervals, &segments)) {
    return nullptr;
  }
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
    {"remember_operator", py_remember_operator, METH_VARARGS, nullptr},
    {"backwards", py_backwards, METH_O, nullptr},
    {"renew", py_renew, METH_NOARGS, nullptr},
    {"clear", py_clear, METH_NOARGS, nullptr},
    {"size", py_size, METH_NOARGS, nullptr},
    {"served", py_served, METH_NOARGS, nullptr},
    {"setup", py_setup, METH_VARARGS, nullptr},
    {nullptr, nullptr, 0, nullptr}};

PyModuleDef definition = {PyModuleDef_HEAD_INIT, "fastattn_native", nullptr, -1, methods};

}  // namespace
}  // namespace fastattn

PyMODINIT_FUNC PyInit_fastattn_native() {
  return PyModule_Create(&fastattn::definition);
}
