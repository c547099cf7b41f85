#include "engine/gguf_tokenizer.h"

#include <algorithm>
#include <cstring>
#include <optional>
#include <utility>
#include <vector>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_join.h"
#include "engine/bpe_tokenizer.h"
#include "engine/safetensors_header.h"
#include "engine/tokenizer_config.h"

namespace atp {
namespace {

constexpr size_t kMaxTokens = 4 << 20;

// tokenizer.ggml.token_type, which are SentencePiece's own numbers.
constexpr int64_t kNormal = 1, kUnknown = 2, kControl = 3, kUserDefined = 4, kByte = 6;

constexpr char kKeyPrefix[] = "tokenizer.ggml.";

// The vocabulary of a file: three arrays of the same length.
struct Vocabulary {
  std::vector<std::string_view> tokens;
  std::vector<float> scores;   // all zero where the file has none
  std::vector<int64_t> types;  // all kNormal where the file has none
};

absl::Status KeyError(const GgufFile& file, std::string_view key, absl::string_view message) {
  return absl::InvalidArgumentError(absl::StrCat(
      file.source(), ": key ", QuoteForError(std::string(kKeyPrefix).append(key)), ": ", message));
}

// A read whose absence says `fallback`.
template <typename T>
absl::StatusOr<T> Optional(absl::StatusOr<T> value, T fallback) {
  if (absl::IsNotFound(value.status())) return fallback;
  return value;
}

std::string Key(absl::string_view name) { return absl::StrCat(kKeyPrefix, name); }

absl::StatusOr<Vocabulary> ReadVocabulary(const GgufFile& file) {
  Vocabulary vocabulary;
  absl::StatusOr<std::vector<std::string_view>> tokens = file.Strings(Key("tokens"));
  if (!tokens.ok()) return absl::InvalidArgumentError(tokens.status().message());
  if (tokens->empty() || tokens->size() > kMaxTokens) {
    return KeyError(file, "tokens",
                    absl::StrCat("expected 1 to ", kMaxTokens, " tokens, found ", tokens->size()));
  }
  vocabulary.tokens = *std::move(tokens);
  const size_t size = vocabulary.tokens.size();
  absl::StatusOr<std::vector<float>> scores =
      Optional(file.Floats(Key("scores")), std::vector<float>(size, 0.0f));
  if (!scores.ok()) return scores.status();
  absl::StatusOr<std::vector<int64_t>> types =
      Optional(file.Ints(Key("token_type")), std::vector<int64_t>(size, kNormal));
  if (!types.ok()) return types.status();
  if (scores->size() != size) {
    return KeyError(file, "scores",
                    absl::StrCat("expected one for each of ", size, " tokens, found ", scores->size()));
  }
  if (types->size() != size) {
    return KeyError(file, "token_type",
                    absl::StrCat("expected one for each of ", size, " tokens, found ", types->size()));
  }
  for (const int64_t type : *types) {
    if (type < kNormal || type > kByte) {
      return KeyError(file, "token_type", absl::StrCat("expected types from 1 to 6, found ", type));
    }
  }
  vocabulary.scores = *std::move(scores);
  vocabulary.types = *std::move(types);
  return vocabulary;
}

// What the file says about BOS and EOS, in the form of the files beside a Hugging Face tokenizer.
absl::StatusOr<TokenizerConfig> ReadSpecials(const GgufFile& file, const Vocabulary& vocabulary,
                                             bool adds_bos) {
  TokenizerConfig config;
  const auto size = static_cast<int64_t>(vocabulary.tokens.size());
  const auto id = [&](absl::string_view key) -> absl::StatusOr<std::optional<TokenId>> {
    const absl::StatusOr<int64_t> value = file.Int(Key(key));
    if (absl::IsNotFound(value.status())) return std::optional<TokenId>();
    if (!value.ok()) return value.status();
    if (*value < 0 || *value >= size) {
      return KeyError(file, std::string(key),
                      absl::StrCat("expected an id below ", size, ", found ", *value));
    }
    return std::optional<TokenId>(static_cast<TokenId>(*value));
  };
  const absl::StatusOr<std::optional<TokenId>> bos = id("bos_token_id");
  if (!bos.ok()) return bos.status();
  config.bos_token_id = *bos;
  for (const char* key : {"eos_token_id", "eot_token_id", "eom_token_id"}) {
    const absl::StatusOr<std::optional<TokenId>> end = id(key);
    if (!end.ok()) return end.status();
    if (end->has_value()) config.eos_token_ids.push_back(**end);
  }
  // Older files of chat models name the end of the text only, so the ends of turns are found by their names.
  constexpr std::string_view ends[] = {"<|eot_id|>", "<|eom_id|>",    "<|end_of_text|>",
                                       "<|im_end|>", "<|endoftext|>", "<|end|>"};
  for (size_t i = 0; i < vocabulary.tokens.size(); ++i) {
    // Converters of before 2024-04 had all added tokens as user-defined ones.
    if (vocabulary.types[i] != kControl && vocabulary.types[i] != kUserDefined) continue;
    if (std::find(std::begin(ends), std::end(ends), vocabulary.tokens[i]) != std::end(ends)) {
      config.eos_token_ids.push_back(static_cast<TokenId>(i));
    }
  }
  const absl::StatusOr<bool> add_bos = Optional(file.Bool(Key("add_bos_token")), adds_bos);
  const absl::StatusOr<bool> add_eos = Optional(file.Bool(Key("add_eos_token")), false);
  if (!add_bos.ok()) return add_bos.status();
  if (!add_eos.ok()) return add_eos.status();
  config.add_bos_token = *add_bos;
  config.add_eos_token = *add_eos;
  return config;
}

// --- SentencePiece: the file's arrays as a sentencepiece_model.proto, which the library reads.

void AppendVarint(uint64_t value, std::string* out) {
  for (; value >= 0x80; value >>= 7) out->push_back(static_cast<char>(value | 0x80));
  out->push_back(static_cast<char>(value));
}
void AppendInt(uint32_t field, uint64_t value, std::string* out) {
  AppendVarint(field << 3, out);
  AppendVarint(value, out);
}
void AppendBytes(uint32_t field, std::string_view bytes, std::string* out) {
  AppendVarint(field << 3 | 2, out);
  AppendVarint(bytes.size(), out);
  out->append(bytes);
}
void AppendFloat(uint32_t field, float value, std::string* out) {
  AppendVarint(field << 3 | 5, out);
  char bytes[sizeof(value)];
  std::memcpy(bytes, &value, sizeof(value));
  out->append(bytes, sizeof(value));
}

absl::StatusOr<std::string> NormalizerSpec(const GgufFile& file) {
  const absl::StatusOr<bool> prefix = Optional(file.Bool(Key("add_space_prefix")), true);
  const absl::StatusOr<bool> folds = Optional(file.Bool(Key("remove_extra_whitespaces")), false);
  const absl::StatusOr<std::vector<int64_t>> map =
      Optional(file.Ints(Key("precompiled_charsmap")), std::vector<int64_t>());
  if (!prefix.ok()) return prefix.status();
  if (!folds.ok()) return folds.status();
  if (!map.ok()) return map.status();
  std::string characters;
  for (const int64_t byte : *map) characters.push_back(static_cast<char>(byte));
  std::string spec;
  AppendBytes(1, characters.empty() ? "identity" : "user_defined", &spec);
  AppendBytes(2, characters, &spec);
  AppendInt(3, *prefix, &spec);
  AppendInt(4, *folds, &spec);
  AppendInt(5, 1, &spec);  // escape_whitespaces
  return spec;
}

std::optional<TokenId> FirstOf(const std::vector<TokenId>& ids) {
  return ids.empty() ? std::nullopt : std::optional<TokenId>(ids.front());
}

// The token of text that no other is for: the one of that type, the one that the file names, or the first.
absl::StatusOr<size_t> UnknownToken(const GgufFile& file, const std::vector<int64_t>& types) {
  const auto typed = std::find(types.begin(), types.end(), kUnknown);
  if (typed != types.end()) return static_cast<size_t>(typed - types.begin());
  const absl::StatusOr<int64_t> named = Optional(file.Int(Key("unknown_token_id")), int64_t{0});
  if (!named.ok()) return named.status();
  const auto size = static_cast<int64_t>(types.size());
  if (*named < 0 || *named >= size) {
    return KeyError(file, "unknown_token_id",
                    absl::StrCat("expected an id below ", size, ", found ", *named));
  }
  return static_cast<size_t>(*named);
}

absl::StatusOr<std::string> SentencePieceProto(const GgufFile& file, const Vocabulary& vocabulary,
                                               const TokenizerConfig& config) {
  std::string proto, piece;
  bool has_bytes = false;
  std::vector<int64_t> types = vocabulary.types;
  const absl::StatusOr<size_t> unknown = UnknownToken(file, types);
  if (!unknown.ok()) return unknown.status();
  const size_t unknown_id = *unknown;
  // The library knows one unknown token; some converters give added control tokens that type, too, and others
  // give it to none.
  for (int64_t& type : types) {
    if (type == kUnknown) type = kControl;
  }
  types[unknown_id] = kUnknown;
  // Whatever a file calls the tokens that it names as the beginning and the end of a text.
  for (const std::optional<TokenId> id : {config.bos_token_id, FirstOf(config.eos_token_ids)}) {
    if (id && types[static_cast<size_t>(*id)] == kUserDefined) types[static_cast<size_t>(*id)] = kControl;
  }
  for (size_t i = 0; i < vocabulary.tokens.size(); ++i) {
    piece.clear();
    AppendBytes(1, vocabulary.tokens[i], &piece);
    AppendFloat(2, vocabulary.scores[i], &piece);
    AppendInt(3, static_cast<uint64_t>(types[i]), &piece);
    AppendBytes(1, piece, &proto);
    has_bytes = has_bytes || types[i] == kByte;
  }
  std::string trainer;
  AppendInt(3, 2, &trainer);  // model_type: BPE
  AppendInt(35, has_bytes, &trainer);
  const auto name = [&](uint32_t id_field, uint32_t name_field, std::optional<TokenId> id) {
    if (!id || types[static_cast<size_t>(*id)] != kControl) return;
    AppendInt(id_field, static_cast<uint64_t>(*id), &trainer);
    AppendBytes(name_field, vocabulary.tokens[static_cast<size_t>(*id)], &trainer);
  };
  AppendInt(40, unknown_id, &trainer);
  AppendBytes(45, vocabulary.tokens[unknown_id], &trainer);
  name(41, 46, config.bos_token_id);
  name(42, 47, FirstOf(config.eos_token_ids));
  AppendBytes(2, trainer, &proto);
  const absl::StatusOr<std::string> normalizer = NormalizerSpec(file);
  if (!normalizer.ok()) return normalizer.status();
  AppendBytes(3, *normalizer, &proto);
  return proto;
}

absl::StatusOr<std::unique_ptr<Tokenizer>> LoadSentencePiece(const GgufFile& file,
                                                             const Vocabulary& vocabulary) {
  absl::StatusOr<TokenizerConfig> config = ReadSpecials(file, vocabulary, /*adds_bos=*/true);
  if (!config.ok()) return config.status();
  const absl::StatusOr<std::string> proto = SentencePieceProto(file, vocabulary, *config);
  if (!proto.ok()) return proto.status();
  return ParseSentencePiece(*proto, file.source(), *config);
}

// --- Byte-level BPE.

struct WordSplit {
  std::string_view name;              // tokenizer.ggml.pre
  std::vector<const char*> patterns;  // one after the other
  bool whole_words = false;           // BpeOptions::ignore_merges, and BOS by default
  bool nfc = false;
};

std::vector<WordSplit> KnownSplits() {
  const WordSplit llama3 = {"llama-bpe", {kLlama3Pattern}, true, false};
  const WordSplit qwen2 = {"qwen2", {kQwen2Pattern}, false, true};
  const WordSplit gpt2 = {"gpt-2", {kGpt2Pattern}, false, false};
  const WordSplit digits = {"smollm", {"\\p{N}", kGpt2Pattern}, false, false};
  const WordSplit tekken = {"tekken", {kTekkenPattern}, true, false};
  std::vector<WordSplit> all = {llama3, qwen2, gpt2, digits, tekken};
  const auto alias = [&all](WordSplit split, std::initializer_list<std::string_view> names) {
    for (const std::string_view name : names) {
      split.name = name;
      all.push_back(split);
    }
  };
  alias(llama3, {"llama3", "llama-v3"});
  alias(qwen2, {"deepseek-r1-qwen"});
  alias(gpt2, {"gpt2"});
  alias(digits, {"starcoder", "refact", "command-r", "codeshell", "exaone"});
  return all;
}

absl::StatusOr<BpeModel> MakeBpeModel(const GgufFile& file, const Vocabulary& vocabulary, bool whole_words,
                                      BpeModel::Vocabulary* entries) {
  const absl::StatusOr<std::vector<std::string_view>> merges = file.Strings(Key("merges"));
  if (!merges.ok()) return absl::InvalidArgumentError(merges.status().message());
  const auto bytes = [](std::string_view token) {
    return PrintableToBytes(token).value_or(std::string(token));  // control tokens are outside the alphabet
  };
  for (size_t i = 0; i < vocabulary.tokens.size(); ++i) {
    const bool text = vocabulary.types[i] == kNormal;
    entries->emplace_back(text ? bytes(vocabulary.tokens[i]) : std::string(vocabulary.tokens[i]),
                          static_cast<TokenId>(i));
  }
  BpeOptions options;
  options.ignore_merges = whole_words;
  absl::StatusOr<BpeModel> model = BpeModel::Create(*entries, options);
  if (!model.ok()) return KeyError(file, "tokens", model.status().message());
  int32_t rank = 0;
  for (const std::string_view merge : *merges) {
    const size_t space = merge.find(' ', 1);
    if (space == std::string_view::npos) {
      return KeyError(file, "merges",
                      absl::StrCat("expected two tokens with a space between, found ", QuoteForError(merge)));
    }
    const absl::Status added =
        model->AddMerge(bytes(merge.substr(0, space)), bytes(merge.substr(space + 1)), rank++);
    if (!added.ok()) return KeyError(file, "merges", added.message());
  }
  return model;
}

absl::StatusOr<std::unique_ptr<Tokenizer>> LoadBpe(const GgufFile& file, const Vocabulary& vocabulary) {
  const absl::StatusOr<std::string_view> pre = Optional<std::string_view>(file.String(Key("pre")), "(none)");
  if (!pre.ok()) return pre.status();
  const std::vector<WordSplit> known = KnownSplits();
  const auto split =
      std::find_if(known.begin(), known.end(), [&](const WordSplit& s) { return s.name == *pre; });
  if (split == known.end()) {
    return KeyError(
        file, "pre",
        absl::StrCat(
            "expected one of ",
            absl::StrJoin(known, ", ", [](std::string* out, const WordSplit& s) { out->append(s.name); }),
            ", found ", QuoteForError(*pre)));
  }
  absl::StatusOr<TokenizerConfig> config = ReadSpecials(file, vocabulary, split->whole_words);
  if (!config.ok()) return config.status();
  BpeModel::Vocabulary entries;
  absl::StatusOr<BpeModel> model = MakeBpeModel(file, vocabulary, split->whole_words, &entries);
  if (!model.ok()) return model.status();
  std::vector<PreTokenizerStep> steps(split->patterns.size());
  for (size_t i = 0; i < steps.size(); ++i) {
    absl::StatusOr<WordRegex> regex = WordRegex::Create(split->patterns[i], /*is_literal=*/false);
    if (!regex.ok()) return regex.status();
    steps[i].regex = std::make_unique<WordRegex>(*std::move(regex));
  }
  std::vector<NormalizerStep> normal_form;
  if (split->nfc) normal_form.push_back({NormalizerStep::kNfc, "", ""});
  absl::StatusOr<Normalizer> normalizer = Normalizer::Create(std::move(normal_form));
  if (!normalizer.ok()) return normalizer.status();
  BpeParts parts{*std::move(model),
                 std::move(entries),
                 {},
                 *std::move(normalizer),
                 PreTokenizer(std::move(steps)),
                 "",
                 false,
                 {}};
  for (size_t i = 0; i < vocabulary.tokens.size(); ++i) {
    const int64_t type = vocabulary.types[i];
    if ((type != kControl && type != kUserDefined && type != kUnknown) || vocabulary.tokens[i].empty())
      continue;
    AddedToken token;
    token.content = std::string(vocabulary.tokens[i]);
    token.id = static_cast<TokenId>(i);
    token.special = type != kUserDefined;
    parts.added_tokens.push_back(std::move(token));
  }
  absl::StatusOr<std::unique_ptr<Tokenizer>> tokenizer = MakeBpeTokenizer(std::move(parts), *config);
  if (tokenizer.ok()) return tokenizer;
  return absl::InvalidArgumentError(absl::StrCat(file.source(), ": ", tokenizer.status().message()));
}

}  // namespace

bool HasGgufTokenizer(const GgufFile& file) { return file.Has(Key("model")); }

absl::StatusOr<std::unique_ptr<Tokenizer>> LoadGgufTokenizer(const GgufFile& file) {
  const absl::StatusOr<std::string_view> kind = file.String(Key("model"));
  if (!kind.ok()) return absl::InvalidArgumentError(kind.status().message());
  if (*kind != "llama" && *kind != "gpt2") {
    return KeyError(file, "model", absl::StrCat("expected llama or gpt2, found ", QuoteForError(*kind)));
  }
  const absl::StatusOr<Vocabulary> vocabulary = ReadVocabulary(file);
  if (!vocabulary.ok()) return vocabulary.status();
  return *kind == "llama" ? LoadSentencePiece(file, *vocabulary) : LoadBpe(file, *vocabulary);
}

absl::StatusOr<std::string> GgufChatTemplate(const GgufFile& file) {
  const absl::StatusOr<std::string_view> text = file.String("tokenizer.chat_template");
  if (absl::IsNotFound(text.status())) return std::string();
  if (!text.ok()) return text.status();
  return std::string(*text);
}

}  // namespace atp
