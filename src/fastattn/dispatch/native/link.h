// What calls of one kind share, and the link from their forward to their backward.

#pragma once

#include "program.h"

#include <c10/core/GradMode.h>
#include <c10/core/InferenceMode.h>
#include <torch/csrc/Exceptions.h>
#include <torch/csrc/autograd/function.h>
#include <torch/csrc/autograd/functions/utils.h>
#include <torch/csrc/autograd/saved_variable.h>
#include <torch/csrc/dynamo/compiled_autograd.h>
#include <torch/csrc/utils/object_ptr.h>

#include <string>

namespace fastattn {

using torch::autograd::variable_list;

inline PyObject* gradients_of = nullptr;  // the way through Python: see calls.py

inline std::atomic<uint64_t> bounds{0};

// What all calls of one key share.
struct Bound {
  const uint64_t number = ++bounds;  // no other's, ever: an address may come back
  std::shared_ptr<Program> forward;
  std::vector<int> inputs;  // sources
  std::vector<int> wanted;  // of these with a gradient
  Held of, names, kind;  // eager.Bound; what the key has the addresses of
  double scale;
  bool returns_lse = false;
  int64_t generation;
  std::mutex lock;
  std::vector<std::shared_ptr<Program>> backwards;  // by the layout of the output's gradient

  Bound(PyObject* of, PyObject* names, PyObject* kind, double scale)
      : of(of), names(names), kind(kind), scale(scale), generation(fastattn::generation.load()) {}

  std::shared_ptr<Program> backward(const Tensors& tensors) {
    const std::lock_guard<std::mutex> held(lock);
    for (const auto& x : backwards) {
      if (x->fits(tensors)) return x;
    }
    return nullptr;
  }
};

inline int gradient_of(int source) {
  return source == kMask ? kGradMask : source == kSinks ? kGradSinks : kGradQ + source;
}

// Whether autograd is where it usually is: not within an operator's implementation. (In torch 2.11 its engine excludes
// another key, of named tensors: this is not for a backward.)
inline bool outermost() {
  const auto usual = c10::InferenceMode::is_enabled() ? c10::default_excluded_set | c10::autograd_dispatch_keyset
                                                      : c10::default_excluded_set;
  return (c10::impl::tls_local_dispatch_key_set().excluded_ - usual).empty();
}

// Python's error, to go on as an exception. The interpreter's lock must be held.
[[noreturn]] inline void throw_as_it_is() {
  python_error error;
  error.persist();  // or what runs until it is caught finds an error that is not its own
  throw error;
}

#if __has_include(<torch/csrc/autograd/node.h>)  // torch 2.13: nodes count their own references
using NodePointer = c10::intrusive_ptr<torch::autograd::Node>;
#else
using NodePointer = std::shared_ptr<torch::autograd::Node>;
#endif

inline PyObject* wrapped(const Tensor& x) {
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

inline void link(const std::shared_ptr<Bound>& bound, Tensors& tensors) {
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

}  // namespace fastattn
