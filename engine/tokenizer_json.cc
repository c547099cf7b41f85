// Hugging Face's tokenizer.json: which of its parts we know, and how they become a BpeTokenizer. A part that
// we do not know is an error that names it: tokens that are nearly right are worse than none.
#include <nlohmann/json.hpp>
#include <utility>

#include "absl/strings/str_cat.h"
#include "engine/bpe_tokenizer.h"
#include "engine/safetensors_header.h"
#include "engine/utf8.h"

namespace atp {
namespace {

using Json = nlohmann::json;

constexpr int kMaxNesting = 8;  // of Sequence in Sequence
constexpr size_t kMaxReplacementBytes = 256;

// Errors inside this file travel as exceptions of this type, as nlohmann's own do; ParseTokenizerJson ends
// them all.
class Malformed : public std::runtime_error {
 public:
  explicit Malformed(const std::string& what) : std::runtime_error(what) {}
};

template <typename T>
T OrThrow(absl::StatusOr<T> value, const char* where) {
  if (!value.ok()) throw Malformed(absl::StrCat(where, ": ", std::string(value.status().message())));
  return *std::move(value);
}

const Json* Find(const Json& json, const char* field) {
  const auto it = json.find(field);
  return it == json.end() || it->is_null() ? nullptr : &*it;
}

const std::string& Text(const Json& json, const char* field) {
  return json.at(field).get_ref<const std::string&>();
}

bool Flag(const Json& json, const char* field, bool otherwise) {
  const Json* value = Find(json, field);
  return value == nullptr ? otherwise : value->get<bool>();
}

TokenId Id(const Json& json) {
  // The type first: converting a float that is out of range is undefined.
  const int64_t id = json.is_number_integer() ? json.get<int64_t>() : -1;
  if (id < 0 || id > INT32_MAX)
    throw Malformed(absl::StrCat("not a token id: ", json.is_number() ? json.dump() : "no number"));
  return static_cast<TokenId>(id);
}

// A text that normalization puts in for another: short, so that it cannot blow texts up.
const std::string& Replacement(const Json& json, const char* field) {
  const std::string& text = Text(json, field);
  if (text.size() > kMaxReplacementBytes || !IsValidUtf8(text))
    throw Malformed(absl::StrCat("normalizer: ", field, " is too long"));
  return text;
}

[[noreturn]] void Unsupported(const char* part, const std::string& type, const char* supported) {
  throw Malformed(
      absl::StrCat(part, " ", QuoteForError(type), " is not supported; supported are ", supported));
}

// Calls visit for each element of a possibly nested Sequence, in order.
template <typename Visit>
void ForEachStep(const Json& json, const char* list, int depth, Visit visit) {
  if (depth > kMaxNesting) throw Malformed(absl::StrCat(list, " is nested too deeply"));
  if (Text(json, "type") != "Sequence") return visit(json);
  for (const Json& element : json.at(list)) ForEachStep(element, list, depth + 1, visit);
}

void ReadNormalizer(const Json& json, std::vector<NormalizerStep>* steps) {
  ForEachStep(json, "normalizers", 0, [&](const Json& step) {
    const std::string& type = Text(step, "type");
    if (type == "NFC") {
      steps->push_back({NormalizerStep::kNfc, "", ""});
    } else if (type == "NFD") {
      steps->push_back({NormalizerStep::kNfd, "", ""});
    } else if (type == "NFKC") {
      steps->push_back({NormalizerStep::kNfkc, "", ""});
    } else if (type == "NFKD") {
      steps->push_back({NormalizerStep::kNfkd, "", ""});
    } else if (type == "Prepend") {
      steps->push_back({NormalizerStep::kPrepend, "", Replacement(step, "prepend")});
    } else if (type == "Replace" && Find(step.at("pattern"), "String") != nullptr &&
               !Text(step.at("pattern"), "String").empty()) {
      steps->push_back(
          {NormalizerStep::kReplace, Text(step.at("pattern"), "String"), Replacement(step, "content")});
    } else {
      Unsupported("normalizer", type, "NFC, NFD, NFKC, NFKD, Prepend, Replace of a string, Sequence");
    }
  });
}

SplitBehavior ReadBehavior(const Json& json) {
  const std::string& name = Text(json, "behavior");
  if (name == "Removed") return SplitBehavior::kRemoved;
  if (name == "Isolated") return SplitBehavior::kIsolated;
  if (name == "MergedWithPrevious") return SplitBehavior::kMergedWithPrevious;
  if (name == "MergedWithNext") return SplitBehavior::kMergedWithNext;
  if (name == "Contiguous") return SplitBehavior::kContiguous;
  Unsupported("behavior", name, "Removed, Isolated, MergedWithPrevious, MergedWithNext, Contiguous");
}

PreTokenizerStep SplitStep(const std::string& pattern, bool is_literal, SplitBehavior behavior,
                           bool invert = false) {
  PreTokenizerStep step;
  step.regex = std::make_unique<WordRegex>(OrThrow(WordRegex::Create(pattern, is_literal), "pre_tokenizer"));
  step.behavior = behavior;
  step.invert = invert;
  return step;
}

PreTokenizerStep MetaspaceStep(const Json& json) {
  PreTokenizerStep step;
  step.kind = PreTokenizerStep::kMetaspace;
  step.replacement = Text(json, "replacement");
  if (step.replacement.empty() || step.replacement.size() > 4) {
    throw Malformed("pre_tokenizer: the replacement of Metaspace must be one character");
  }
  step.prepend = Flag(json, "add_prefix_space", true) ? PreTokenizerStep::kAlways : PreTokenizerStep::kNever;
  if (Find(json, "prepend_scheme") != nullptr) {
    const std::string& scheme = Text(json, "prepend_scheme");
    step.prepend = scheme == "first"   ? PreTokenizerStep::kFirst
                   : scheme == "never" ? PreTokenizerStep::kNever
                                       : PreTokenizerStep::kAlways;
  }
  if (Flag(json, "split", true)) {
    step.regex = std::move(SplitStep(step.replacement, true, SplitBehavior::kMergedWithNext).regex);
    step.behavior = SplitBehavior::kMergedWithNext;
  }
  return step;
}

// Returns whether the words are bytes (ByteLevel).
bool ReadPreTokenizer(const Json& json, std::vector<PreTokenizerStep>* steps) {
  bool byte_level = false;
  ForEachStep(json, "pretokenizers", 0, [&](const Json& step) {
    if (byte_level) throw Malformed("pre_tokenizer: ByteLevel must be the last of a Sequence");
    const std::string& type = Text(step, "type");
    if (type == "ByteLevel") {
      byte_level = true;
      if (Flag(step, "add_prefix_space", true)) {
        steps->emplace_back();
        steps->back().kind = PreTokenizerStep::kPrefixSpace;
      }
      if (Flag(step, "use_regex", true)) {
        steps->push_back(SplitStep(kGpt2Pattern, false, SplitBehavior::kIsolated));
      }
    } else if (type == "Split") {
      const Json& pattern = step.at("pattern");
      const bool is_literal = Find(pattern, "String") != nullptr;
      steps->push_back(SplitStep(Text(pattern, is_literal ? "String" : "Regex"), is_literal,
                                 ReadBehavior(step), Flag(step, "invert", false)));
    } else if (type == "Digits") {
      steps->push_back(SplitStep(Flag(step, "individual_digits", false) ? "\\p{N}" : "\\p{N}+", false,
                                 SplitBehavior::kIsolated));
    } else if (type == "Punctuation") {
      steps->push_back(
          SplitStep("[\\p{P}!-/:-@\\[-`{-~]", false,
                    Find(step, "behavior") == nullptr ? SplitBehavior::kIsolated : ReadBehavior(step)));
    } else if (type == "Metaspace") {
      steps->push_back(MetaspaceStep(step));
    } else {
      Unsupported("pre_tokenizer", type, "ByteLevel, Split, Digits, Punctuation, Metaspace, Sequence");
    }
  });
  return byte_level;
}

std::vector<TokenId> TemplateIds(const Json& special_tokens, const std::string& name) {
  std::vector<TokenId> ids;
  for (const Json& id : special_tokens.at(name).at("ids")) ids.push_back(Id(id));
  return ids;
}

void ReadPostProcessor(const Json& json, TokenizerDefaults* defaults) {
  ForEachStep(json, "processors", 0, [&](const Json& step) {
    const std::string& type = Text(step, "type");
    if (type == "ByteLevel") return;  // only moves offsets, which we do not have
    if (type != "TemplateProcessing")
      Unsupported("post_processor", type, "TemplateProcessing, ByteLevel, Sequence");
    bool after = false;
    std::vector<TokenId> prefix;
    for (const Json& piece : step.at("single")) {
      if (Find(piece, "Sequence") != nullptr) {
        after = true;
        continue;
      }
      const std::vector<TokenId> ids =
          TemplateIds(step.at("special_tokens"), Text(piece.at("SpecialToken"), "id"));
      std::vector<TokenId>* side = after ? &defaults->suffix : &prefix;
      side->insert(side->end(), ids.begin(), ids.end());
    }
    defaults->prefix.insert(defaults->prefix.begin(), prefix.begin(), prefix.end());
  });
  if (!defaults->prefix.empty()) defaults->bos = defaults->prefix[0];
}

// How tokens become text: by bytes, or with `space` for " " and perhaps <0xXX> for bytes.
void ReadDecoder(const Json& json, BpeParts* parts) {
  ForEachStep(json, "decoders", 0, [&](const Json& step) {
    const std::string& type = Text(step, "type");
    if (type == "Metaspace") {
      parts->space = Text(step, "replacement");
      parts->strips_leading_space = Find(step, "prepend_scheme") == nullptr
                                        ? Flag(step, "add_prefix_space", true)
                                        : Text(step, "prepend_scheme") != "never";
    } else if (type == "Replace" && Find(step.at("pattern"), "String") != nullptr &&
               Text(step, "content") == " ") {
      parts->space = Text(step.at("pattern"), "String");
    } else if (type == "Strip" && Text(step, "content") == " ") {
      parts->strips_leading_space = step.at("start") != 0;
    } else if (type != "ByteLevel" && type != "ByteFallback" && type != "Fuse") {
      Unsupported("decoder", type,
                  "ByteLevel, ByteFallback, Fuse, Metaspace, Replace by a space, Strip of a space, Sequence");
    }
  });
}

void ReadAddedTokens(const Json& list, std::vector<AddedToken>* tokens) {
  for (const Json& json : list) {
    AddedToken token;
    token.content = Text(json, "content");
    token.id = Id(json.at("id"));
    token.special = Flag(json, "special", false);
    token.single_word = Flag(json, "single_word", false);
    token.lstrip = Flag(json, "lstrip", false);
    token.rstrip = Flag(json, "rstrip", false);
    token.normalized = Flag(json, "normalized", false);
    tokens->push_back(std::move(token));
  }
}

// Byte-level files write tokens in printable characters; a token outside that alphabet is one that text never
// becomes.
std::string ToBytes(std::string_view token, bool byte_level) {
  if (!byte_level) return std::string(token);
  return PrintableToBytes(token).value_or(std::string(token));
}

BpeModel ReadModel(const Json& json, bool byte_level, BpeModel::Vocabulary* vocabulary) {
  if (Find(json, "type") != nullptr && Text(json, "type") != "BPE")
    Unsupported("model", Text(json, "type"), "BPE");
  for (const char* field : {"continuing_subword_prefix", "end_of_word_suffix"}) {
    if (Find(json, field) != nullptr && !Text(json, field).empty()) {
      throw Malformed(absl::StrCat("model.", field, " is not supported"));
    }
  }
  const Json::object_t& vocab = json.at("vocab").get_ref<const Json::object_t&>();
  vocabulary->reserve(vocab.size());
  for (const auto& [token, id] : vocab) vocabulary->emplace_back(ToBytes(token, byte_level), Id(id));
  BpeOptions options;
  options.byte_level = byte_level;
  options.ignore_merges = Flag(json, "ignore_merges", false);
  options.byte_fallback = Flag(json, "byte_fallback", false);
  options.fuse_unknown = Flag(json, "fuse_unk", false);
  if (Find(json, "unk_token") != nullptr) {
    const auto unknown = vocab.find(Text(json, "unk_token"));
    if (unknown == vocab.end()) throw Malformed("model.unk_token is not in the vocabulary");
    options.unknown = Id(unknown->second);
  }
  BpeModel model = OrThrow(BpeModel::Create(*vocabulary, options), "model.vocab");
  int32_t rank = 0;
  for (const Json& merge : json.at("merges")) {
    std::string_view left, right;
    if (merge.is_string()) {  // "a b"; newer files write ["a", "b"], where a token may contain a space
      const std::string_view both = merge.get_ref<const std::string&>();
      const size_t space = both.find(' ');
      if (space == std::string_view::npos)
        throw Malformed(absl::StrCat("model.merges[", rank, "] has no space"));
      left = both.substr(0, space);
      right = both.substr(space + 1);
    } else {
      left = merge.at(0).get_ref<const std::string&>();
      right = merge.at(1).get_ref<const std::string&>();
    }
    const absl::Status s = model.AddMerge(ToBytes(left, byte_level), ToBytes(right, byte_level), rank++);
    if (!s.ok()) throw Malformed(absl::StrCat("model.merges: ", std::string(s.message())));
  }
  return model;
}

absl::StatusOr<std::unique_ptr<Tokenizer>> Build(const Json& json, const TokenizerConfig& config) {
  if (!json.is_object()) throw Malformed("expected a JSON object");
  std::vector<NormalizerStep> normalizer;
  if (const Json* part = Find(json, "normalizer")) ReadNormalizer(*part, &normalizer);
  std::vector<PreTokenizerStep> pre_tokenizer;
  bool byte_level = false;
  if (const Json* part = Find(json, "pre_tokenizer")) byte_level = ReadPreTokenizer(*part, &pre_tokenizer);
  BpeModel::Vocabulary vocabulary;
  BpeModel model = ReadModel(json.at("model"), byte_level, &vocabulary);
  BpeParts parts{std::move(model),
                 std::move(vocabulary),
                 {},
                 OrThrow(Normalizer::Create(std::move(normalizer)), "normalizer"),
                 PreTokenizer(std::move(pre_tokenizer)),
                 "",
                 false,
                 {}};
  if (const Json* part = Find(json, "added_tokens")) ReadAddedTokens(*part, &parts.added_tokens);
  if (const Json* part = Find(json, "post_processor")) ReadPostProcessor(*part, &parts.defaults);
  if (const Json* part = Find(json, "decoder")) ReadDecoder(*part, &parts);
  return MakeBpeTokenizer(std::move(parts), config);
}

}  // namespace

absl::StatusOr<std::unique_ptr<Tokenizer>> ParseTokenizerJson(std::string_view json, const std::string& name,
                                                              const TokenizerConfig& config) {
  try {
    // nlohmann parses and destroys without recursion, so nesting cannot overflow the stack.
    const Json document = Json::parse(json.begin(), json.end());
    absl::StatusOr<std::unique_ptr<Tokenizer>> tokenizer = Build(document, config);
    if (tokenizer.ok()) return tokenizer;
    return absl::InvalidArgumentError(absl::StrCat(name, ": ", std::string(tokenizer.status().message())));
  } catch (const Json::parse_error& e) {  // its text quotes the file, at any length
    return absl::InvalidArgumentError(absl::StrCat(name, ": not JSON: a syntax error at byte ", e.byte));
  } catch (const std::exception& e) {
    return absl::InvalidArgumentError(absl::StrCat(name, ": ", std::string(e.what()).substr(0, 500)));
  }
}

}  // namespace atp
