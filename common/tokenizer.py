"""
Text <-> token ids: the built-in byte tokenizer, tiktoken's vocabularies, a model folder's
tokenizer.json; and chat templates, which write messages as the model's own folder says.

Prompt and response are always tokenised apart, so that a training mask begins exactly where
sampling began. Text that a user wrote never becomes a special token.
"""
import functools
import hashlib
import json
import re
from datetime import date

import tiktoken

CHATML = (
    "{% for message in messages %}"
    "<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n"
    "{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}")
# two private-use characters
HIDE = "\U0010fffd"               # put inside a special token's name that a user wrote
INSIDE = "\U0010fffc"             # a token of FolderTokenizer's own, in front of text inside a text


def unhide(text):
    """Text without HIDE. A HIDE that a user wrote was doubled."""
    return re.sub(f"{HIDE}({HIDE}?)", r"\1", text)


class InputError(Exception):
    """Invalid user input; printed as one line, without a traceback."""


class Tokenizer:
    """A vocabulary, and how prompts are written with it.

    name: of the vocabulary. n_vocab: number of ids. special: {text: id} of the special tokens. end:
    id that ends a response to a plain prompt. template: chat template, jinja source, "" for none.
    turns: a lone prompt is a user's turn as well. system: system message of chats that have none,
    "auto" leaves it to the template.
    today: date that a template may print; a resumed run keeps it. files: {name: text}, of a folder.
    """

    def __init__(self, name, n_vocab, special, end, template="", turns=False, system="auto",
                 files=None, today=""):
        self.name, self.n_vocab, self.special, self.end = name, n_vocab, special, end
        self.template, self.turns, self.system = template, turns, system
        self.files = files or {}
        self.today = today or date.today().isoformat()
        self.first = []                                # ids that a plain prompt begins with (Llama)

    def encode(self, text, special=False, inside=False):
        """Text -> ids. Names of special tokens are text; with `special` they are tokens. inside:
        the text follows other text, so SentencePiece writes no space before it."""
        raise NotImplementedError

    def decode(self, ids):
        """Ids -> text; special tokens are written by name."""
        raise NotImplementedError

    # ------------------------------------------------------------------------------- chat template

    @functools.cached_property
    def compiled_template(self):
        return compile_template(self.template, date.fromisoformat(self.today))

    @functools.cached_property
    def special_pattern(self):
        longest_first = sorted(self.special, key=len, reverse=True)
        return "|".join(re.escape(name) for name in longest_first) or "(?!)"  # (?!) matches nothing

    @functools.cached_property
    def turn_end(self):
        """The special token that ends an assistant's turn: the first one after its text."""
        probe = "nanoPO probe"
        messages = [{"role": "user", "content": "U"}, {"role": "assistant", "content": probe}]
        text = self.render(messages)
        found = re.search(self.special_pattern, text.rpartition(probe)[2])
        if probe not in text or not found:
            raise InputError("the chat template does not end the assistant's turn with a special "
                             "token; --chat plain does without it")
        return found[0]

    def hide_special(self, text):
        """Names of special tokens, each with HIDE after its first character."""
        text = text.replace(HIDE, HIDE + HIDE)
        return re.sub(f"({self.special_pattern})", lambda m: m[0][0] + HIDE + m[0][1:], text)

    def hide_everywhere(self, x):
        """hide_special of every text in messages; tool calls and reasoning are a user's too."""
        if isinstance(x, str):
            return self.hide_special(x)
        if isinstance(x, list):
            return [self.hide_everywhere(y) for y in x]
        if isinstance(x, dict):
            return {name: self.hide_everywhere(y) for name, y in x.items()}
        return x

    def render(self, messages, add_generation_prompt=False):
        """What the template writes. A special token's name inside a message is marked with HIDE."""
        if not self.template:
            raise InputError("a chat (messages, or --chat chat) needs a chat template, and this "
                             "tokenizer has none; use plain prompts (--chat plain)")
        has_system = len(messages) > 0 and messages[0]["role"] == "system"
        if self.system != "auto" and not has_system:
            messages = [{"role": "system", "content": self.system}] + messages
        hidden = self.hide_everywhere(messages)
        template = self.compiled_template
        try:
            return template.render(
                messages=hidden, add_generation_prompt=add_generation_prompt, tools=None,
                documents=None, **self.template_tokens)
        except Exception as e:                     # a template is a program and may fail in any way
            reason = " ".join(str(e).split())
            raise InputError(f"the chat template fails ({reason}); --chat plain does without "
                             "it") from None

    @functools.cached_property
    def template_tokens(self):
        """bos_token and its like, which templates use by name."""
        settings = json.loads(self.files.get("tokenizer_config.json", "{}"))
        tokens = {}
        for kind in ("bos", "eos", "unk", "pad", "sep", "cls", "mask"):
            name = f"{kind}_token"
            token = settings.get(name)
            if isinstance(token, dict):
                token = token.get("content")
            if token is not None:
                tokens[name] = token
        return tokens

    def encode_rendered(self, text, inside=False):
        """What `render` wrote -> ids. Special tokens are the template's; a user's are text."""
        ids = self.encode(text, special=True, inside=inside)
        written = [self.special[name] for name in re.findall(self.special_pattern, text)]
        found = [i for i in ids if i in self.special.values()]
        if HIDE not in text and found == written:      # a normaliser can make a name out of text
            return ids
        ids = []
        for piece in re.split(f"({self.special_pattern})", text):
            if piece in self.special:
                ids.append(self.special[piece])
            elif piece:
                ids += self.encode(unhide(piece), inside=inside or len(ids) > 0)
        return ids


class TiktokenTokenizer(Tokenizer):
    """tiktoken's Encoding: the built-in bytes, or one of OpenAI's vocabularies."""

    def __init__(self, name, pattern, ranks, special, **more):
        super().__init__(name, 1 + max(*ranks.values(), *special.values()), special, **more)
        self.pattern, self.ranks = pattern, ranks
        gaps = set(range(self.n_vocab)) - set(ranks.values()) - set(special.values())
        unused = {f"<|unused {i}|>": i for i in gaps}  # an untrained model may sample any id
        self.encoding = tiktoken.Encoding(name, pat_str=pattern, mergeable_ranks=ranks,
                                          special_tokens=special | unused)

    def encode(self, text, special=False, inside=False):
        allowed = set(self.special) if special else set()
        return self.encoding.encode(text, allowed_special=allowed, disallowed_special=())

    def decode(self, ids):
        return self.encoding.decode(ids)


class FolderTokenizer(Tokenizer):
    """A model folder's tokenizer.json, read by the `tokenizers` package."""

    def __init__(self, path, files, end, **more):
        try:
            from tokenizers import AddedToken
            from tokenizers import Tokenizer as Backend
        except ImportError:
            raise InputError(f"{path}: pip install tokenizers, to read tokenizer.json") from None
        if "tokenizer.json" not in files:
            raise InputError(f"{path}: tokenizer.json is missing; transformers writes one: "
                             "AutoTokenizer.from_pretrained(FOLDER).save_pretrained(FOLDER)")
        try:
            self.backend = Backend.from_str(files["tokenizer.json"])
        except Exception as e:                         # the package raises bare exceptions
            raise InputError(f"{path}: tokenizer.json cannot be read ({e})") from None
        self.backend.no_padding()
        self.backend.no_truncation()
        added = self.backend.get_added_tokens_decoder()
        special = {token.content: i for i, token in added.items() if token.special}
        name = hashlib.sha256(files["tokenizer.json"].encode()).hexdigest()[:12]
        n_vocab = 1 + max(self.backend.get_vocab().values())
        super().__init__(name, n_vocab, special, end, files=files, **more)
        self.backend.add_tokens([AddedToken(INSIDE, normalized=False)])
        try:
            plain, whole = self.encode("a"), self.backend.encode("a").ids
        except Exception as e:
            raise InputError(f"{path}: tokenizer.json cannot encode ({e})") from None
        if whole[len(whole) - len(plain):] != plain:
            raise InputError(f"{path}: tokenizer.json adds a token after the text, which would end "
                             "every prompt")
        self.first = whole[:len(whole) - len(plain)]

    def encode(self, text, special=False, inside=False):
        text = text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")  # lone surrogates
        text = text.replace(INSIDE, "\ufffd")                  # INSIDE has no row in the model
        self.backend.encode_special_tokens = not special                # True: their names are text
        ids = self.encode_piece(text, inside)
        if special or not set(ids) & set(self.special.values()):
            return ids
        ids = []                                      # Unigram's vocabulary has their names as well
        for piece in self.hide_special(text).split(HIDE):
            ids += self.encode_piece(piece, inside or len(ids) > 0)
        return ids

    def encode_piece(self, text, inside):
        if inside:                                     # the text stands behind an added token
            return self.backend.encode(INSIDE + text, add_special_tokens=False).ids[1:]
        return self.backend.encode(text, add_special_tokens=False).ids

    def decode(self, ids):
        return self.backend.decode(ids, skip_special_tokens=False)


def make_tokenizer(name="bytes", turns=False, system="auto"):
    """"bytes" is built in, any other name is one of tiktoken's; ChatML's two tokens are added."""
    if name == "bytes":
        pattern = r"[\s\S]+"
        ranks = {bytes([i]): i for i in range(256)}
        special = {"<|endoftext|>": 256}
    else:
        try:
            base = tiktoken.get_encoding(name)
        except ValueError:
            known = ", ".join(tiktoken.list_encoding_names())
            raise InputError(f"tokenizer {name!r} is unknown: use bytes or one of {known}")
        except Exception as e:                         # tiktoken downloads a vocabulary once
            raise InputError(f"tokenizer {name!r} cannot be downloaded ({type(e).__name__}); bytes "
                             "is built in")
        pattern, ranks, special = base._pat_str, base._mergeable_ranks, dict(base._special_tokens)
    for mark in ("<|im_start|>", "<|im_end|>"):
        special.setdefault(mark, 1 + max(*ranks.values(), *special.values()))
    return TiktokenTokenizer(name, pattern, ranks, special, end=special["<|endoftext|>"],
                             template=CHATML, turns=turns, system=system)


def chat_by_default(chat, default, system="auto"):
    """Whether a lone prompt is a user's turn, by --chat; "auto" means `default`."""
    if chat not in ("auto", "chat", "plain"):
        raise InputError(f"--chat {chat}: must be auto, chat or plain")
    turns = default if chat == "auto" else chat == "chat"
    if system != "auto" and not turns:
        raise InputError(f"--system {system}: prompts are plain text here; --chat chat makes them "
                         "turns")
    return turns


def compile_template(source, today):
    """A chat template in jinja's sandbox, with the functions that transformers gives to it."""
    import jinja2
    from jinja2.sandbox import ImmutableSandboxedEnvironment
    if tuple(int(x) for x in jinja2.__version__.split(".")[:3]) < (3, 1, 6):
        raise InputError("chat templates need jinja2 3.1.6 or newer, whose sandbox is safe: pip "
                         "install -U jinja2")

    def raise_exception(message):
        raise jinja2.TemplateError(message)

    def tojson(x, ensure_ascii=False, **more):         # jinja's own escapes HTML
        return json.dumps(x, ensure_ascii=ensure_ascii, **more)

    env = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True,
                                        extensions=["jinja2.ext.loopcontrols"])
    env.filters["tojson"] = tojson
    env.globals["raise_exception"] = raise_exception
    env.globals["strftime_now"] = today.strftime
    # {% generation %} marks the assistant's text for transformers' masks and writes nothing
    source = re.sub(r"(\{%[-+]?\s*)generation(\s*[-+]?%\})", r"\1if true\2", source)
    source = re.sub(r"(\{%[-+]?\s*)endgeneration(\s*[-+]?%\})", r"\1endif\2", source)
    try:
        return env.from_string(source)
    except Exception as e:                             # it may be nested too deep for Python
        reason = " ".join(str(e).split())
        raise InputError(f"the chat template cannot be read ({reason}); --chat plain does without "
                         "it") from None


# --------------------------------------------------------------------- prompts, responses and masks


def before_response(messages):
    """The messages before the assistant's last one."""
    return messages[:-1] if messages[-1]["role"] == "assistant" else messages


def as_messages(tokenizer, row):
    """The messages of a prompt, None where it is plain text."""
    if "messages" in row:
        return before_response(row["messages"])
    if tokenizer.turns and "_dialogue" in row:         # HH-RLHF's
        return row["_dialogue"]
    if tokenizer.turns:
        return [{"role": "user", "content": row["prompt"].removesuffix("\n")}]
    return None


def encode_prompt(tokenizer, row):
    """The ids that the model reads before it responds: what transformers' apply_chat_template gives
    with add_generation_prompt=True, or the plain prompt."""
    messages = as_messages(tokenizer, row)
    if messages is None:
        return tokenizer.first + tokenizer.encode(row["prompt"])
    return tokenizer.encode_rendered(tokenizer.render(messages, add_generation_prompt=True))


def encode_response(tokenizer, row, text):
    """Prompt, response and end token -> tokens, mask (lists)."""
    ids = encode_prompt(tokenizer, row)
    chat = as_messages(tokenizer, row) is not None
    if chat and "_dialogue" in row:                    # its turns begin with a space
        text = text.strip()
    end = tokenizer.special[tokenizer.turn_end] if chat else tokenizer.end
    response = tokenizer.encode(text, inside=True) + [end]
    return ids + response, [0] * len(ids) + [1] * len(response)


def encode_chat(tokenizer, messages):
    """Messages -> tokens, mask (lists), and the number of assistant turns in the mask.

    The mask is 1 on the assistant's turns and the tokens that end them. They are found by rendering
    prefixes: the text before a turn, with the generation prompt, and the text up to its end. Where
    a template rewrites earlier turns (Qwen 3 drops earlier thoughts), a prefix of the conversation
    is not a prefix of its text, and the last turn alone is trained.
    """
    end = tokenizer.turn_end
    turns = []                                         # text before a turn, text of the turn
    for i, message in enumerate(messages):
        if message["role"] != "assistant" or message.get("weight") == 0:     # not trained
            continue
        try:
            prompt = tokenizer.render(messages[:i], add_generation_prompt=True)
        except InputError:
            if i > 0:
                raise
            continue                                   # many templates cannot begin with a response
        whole = tokenizer.render(messages[:i + 1])
        response, found, _ = whole[len(prompt):].partition(end)
        if not whole.startswith(prompt) or not found:
            response = tokenizer.hide_special(message["content"])
        turns.append((prompt, response))
    for (prompt, response), (later, _) in zip(turns, turns[1:]):
        if not later.startswith(prompt + response + end):
            turns = turns[-1:]
            break
    ids, mask, written = [], [], ""
    for prompt, response in turns:
        context = tokenizer.encode_rendered(prompt[len(written):], inside=len(written) > 0)
        turn = tokenizer.encode(unhide(response), inside=True) + [tokenizer.special[end]]
        ids += context + turn
        mask += [0] * len(context) + [1] * len(turn)
        written = prompt + response + end
    return ids, mask, len(turns)


def decode_responses(tokenizer, tokens, mask, stop_token_ids):
    """The text of every response (B,) without its end token, None for one that did not end."""
    texts = []
    for row, chosen in zip(tokens.cpu(), mask.cpu()):
        ids = row[chosen > 0].tolist()
        ended = ids and ids[-1] in stop_token_ids
        texts.append(tokenizer.decode(ids[:-1]) if ended else None)
    return texts
