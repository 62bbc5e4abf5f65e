// The operators of compiled graphs, without Python: `fastattn::attention` and `fastattn::attention_backward`.
//
// A graph calls them through torch's dispatcher. A call of a kind that came back runs its program here, any other one
// the implementation that Python has registered. Options are read by their types alone: whatever they mean, they are
// part of the key.

#pragma once

#include "program.h"

#include <ATen/core/dispatch/Dispatcher.h>
#include <c10/core/GradMode.h>
#include <torch/library.h>

#include <algorithm>
#include <cstring>
#include <string>
#include <unordered_map>

namespace fastattn {

constexpr int kAbsent = kSources;  // of a tensor that no program takes

// What calls of an operator of one kind run.
struct Entry {
  std::shared_ptr<Program> program;
  std::vector<Made> empty;  // results that nobody asked for
};

struct Operator {
  const char* name;
  std::vector<int> tensors;  // the sources of its arguments, as far as they are tensors, in order
  std::vector<int> results;
  std::mutex lock;  // nothing of Python's runs under it: who calls may hold the interpreter's lock, or may not
  std::unordered_map<Key, std::shared_ptr<const Entry>, KeyHash> table;
  std::atomic<size_t> size{0};

  Operator(const char* name, std::vector<int> tensors, std::vector<int> results)
      : name(name), tensors(std::move(tensors)), results(std::move(results)) {}

  std::shared_ptr<const Entry> find(const Key& key) {
    const std::lock_guard<std::mutex> held(lock);
    const auto at = table.find(key);
    return at == table.end() ? nullptr : at->second;
  }

  void remember(Key&& key, std::shared_ptr<const Entry> entry) {
    const std::lock_guard<std::mutex> held(lock);
    std::swap(table[std::move(key)], entry);  // the one before is dropped after the lock
    size = table.size();
  }

  void clear() {
    decltype(table) dropped;
    const std::lock_guard<std::mutex> held(lock);
    dropped.swap(table);
    size = 0;
  }

  // In a forked child, where a thread may hold the lock that is not there. What was remembered stays allocated.
  void renew() {
    new (&lock) std::mutex;
    new (&table) decltype(table);
    size = 0;
  }
};

// They live for ever: threads of torch's may be at work while the process ends.
inline Operator* const operators[] = {
    new Operator(
        "attention", {kQ, kK, kV, kMask, kLo, kHi, kSinks, kQLengths, kKvLengths, kSegments}, {kOut, kLse}),
    new Operator(
        "attention_backward",
        {kGradOut, kAbsent, kOut, kLse, kQ, kK, kV, kMask, kLo, kHi, kSinks, kQLengths, kKvLengths, kSegments},
        {kGradQ, kGradK, kGradV, kGradMask, kGradSinks})};
constexpr int kOperators = 2;

inline void append(Key& key, const std::string& text) {
  key.push_back(int64_t(text.size()));
  for (size_t i = 0; i < text.size(); i += sizeof(int64_t)) {
    int64_t word = 0;
    std::memcpy(&word, text.data() + i, std::min(sizeof word, text.size() - i));
    key.push_back(word);
  }
}

// The arguments as tensors and a key. False where only Python can judge them.
inline bool read(const Operator& of, c10::ArrayRef<c10::IValue> arguments, Tensors& tensors, Key& key) {
  for (size_t i = 0; i < arguments.size(); ++i) {
    const auto& x = arguments[i];
    if (i < of.tensors.size()) {
      const bool there = x.isTensor() && x.toTensor().defined();
      key.push_back(there);
      if (!there) continue;
      const auto& tensor = x.toTensor();
      if (of.tensors[i] == kAbsent || tensor.unsafeGetTensorImpl()->has_symbolic_sizes_strides()) return false;
      tensors[of.tensors[i]] = tensor;
      append(key, tensor, false);
    } else if (x.isString()) {
      append(key, x.toStringRef());
    } else if (x.isDouble()) {
      int64_t bits = 0;
      const double value = x.toDouble();
      std::memcpy(&bits, &value, sizeof bits);
      key.push_back(bits);
    } else if (x.isInt()) {
      key.push_back(x.toInt());
    } else if (x.isBool()) {
      key.push_back(x.toBool());
    } else {
      return false;
    }
  }
  return true;
}

// Whether autograd has to know of a call.
inline bool links(const Tensors& tensors) {
  return c10::GradMode::is_enabled() &&
      std::any_of(tensors.begin(), tensors.end(), [](const Tensor& x) { return x.defined() && x.requires_grad(); });
}

// autograd: the dispatcher is still above it.
inline bool served(Operator& of, bool autograd, size_t count, torch::jit::Stack& stack) {
  if (of.size == 0 || !unwatched()) return false;
  thread_local Key key;
  key.clear();
  Tensors tensors;
  try {
    if (!read(of, torch::jit::last(stack, count), tensors, key) || (autograd && links(tensors))) return false;
    const auto entry = of.find(key);
    if (entry == nullptr || !entry->program->fits(tensors) || !entry->program->run(tensors, true)) return false;
    const at::AutoDispatchBelowADInplaceOrView below;
    for (const auto& x : entry->empty) {
      tensors[x.source] =
          at::empty_strided(x.sizes, x.strides, at::TensorOptions().device(entry->program->device).dtype(x.dtype));
    }
  } catch (const c10::Error&) {  // no memory, a sparse tensor: Python knows what to do
    return false;
  }
  torch::jit::drop(stack, count);
  for (const auto i : of.results) stack.emplace_back(std::move(tensors[i]));
  return true;
}

template <int number, c10::DispatchKey key>
struct Kernel {
  static inline const c10::SafeKernelFunction* python = nullptr;

  static void run(const c10::OperatorHandle& handle, c10::DispatchKeySet keys, torch::jit::Stack* stack) {
    const bool autograd = isAutogradKey(key);
    if (served(*operators[number], autograd, handle.schema().arguments().size(), *stack)) return;
    python->callBoxed(handle, keys, stack);
  }

  static constexpr bool isAutogradKey(c10::DispatchKey x) {
    return x == c10::DispatchKey::AutogradCPU || x == c10::DispatchKey::AutogradCUDA;
  }

  static void enter(torch::Library& library, const c10::OperatorHandle& handle) {
    python = new c10::SafeKernelFunction(handle.getComputedKernelForDispatchKey(key));
    library.impl(operators[number]->name, torch::dispatch(key, torch::CppFunction::makeFromBoxedFunction<&run>()));
  }
};

template <int number>
void enter_operator(torch::Library& library) {
  const auto name = std::string("fastattn::") + operators[number]->name;
  const auto handle = c10::Dispatcher::singleton().findSchemaOrThrow(name.c_str(), "");
  Kernel<number, c10::DispatchKey::CPU>::enter(library, handle);
  Kernel<number, c10::DispatchKey::CUDA>::enter(library, handle);
  Kernel<number, c10::DispatchKey::AutogradCPU>::enter(library, handle);
  Kernel<number, c10::DispatchKey::AutogradCUDA>::enter(library, handle);
}

// Once in a process, with the first program of an operator, which Python has registered by then: from then on the
// operators are these, above what Python has registered for all devices.
inline void enter_operators() {
  static auto* const library = [] {
    auto* made = new torch::Library(torch::Library::IMPL, "fastattn", std::nullopt, __FILE__, __LINE__);
    enter_operator<0>(*made);
    enter_operator<1>(*made);
    return made;
  }();
  (void)library;
}

}  // namespace fastattn
