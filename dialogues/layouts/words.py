"""The keys and column names that files use for speakers, texts, roles, ids and times."""

import re
from collections.abc import Iterable
from functools import lru_cache
from typing import Any, NamedTuple

USER, ASSISTANT = "User", "Assistant"
ROLES = {
    **dict.fromkeys(("user", "human", "prompter"), USER),
    **dict.fromkeys(("assistant", "gpt", "chatgpt", "bot", "chatbot", "model", "ai"), ASSISTANT),
}
SYSTEM = ("system", "developer")
TOOLS = (
    *("tool", "function", "functioncall", "functionresponse", "functionresult", "functionoutput", "observation"),
    *("function_call", "function_response", "toolcall", "tooluse", "toolresponse", "toolresult", "tooloutput"),
    *("toolcalls", "ipython", "environment"),
)

# Keys and column names, normalised by `plain`, in descending order of likelihood.
SPEAKER_KEYS = (
    *("speaker", "sendername", "nickname", "sender", "authorname", "author", "character", "charactername", "creator"),
    *("realname", "displayname", "nick", "screenname", "fromname", "from", "role", "who", "person"),
    *("participant", "speakername", "speakers", "speakerid", "speakeridx", "name", "username", "user", "actor"),
    *("senderid", "authorid", "userid", "usertype", "fromid", "isuser", "fromme", "isfromme", "inbound"),
    *("absender", "sprecher", "sprecherin", "wer", "von", "figur", "rolle", "expediteur", "auteur", "autor", "autore"),
    *("qui", "personnage", "locuteur", "nom", "de", "remitente", "emisor", "hablante", "quien", "personaje", "nombre"),
    *("remetente", "quem", "personagem", "nome", "mittente", "parlante", "chi", "afzender", "spreker", "wie"),
    *("falante", "src", "agent", "nadawca", "отправитель", "автор", "имя", "кто", "gönderen", "pengirim", "送信者"),
    *("発言者", "名前", "发送者", "发言人", "보낸사람", "話者", "発話者", "osoba", "mówca", "mluvčí", "talare"),
    *("taler", "puhuja", "διαλέγων", "voce", "poster", "talker", "whosaid", "saidby"),
)
TEXT_KEYS = (
    *("text", "message", "content", "utterance", "value", "body", "contents", "mes", "messagetext", "messagebody"),
    *("line", "transcript", "msg", "utt", "messagecontent", "parts", "speech", "spokenwords", "rawtext", "dialogue"),
    *("dialog", "dialogtext", "dialoguetext", "sentence", "words", "quote", "comment", "selftext", "data", "plaintext"),
    *("nachricht", "inhalt", "aussage", "zeile", "texte", "contenu", "replique", "réplique", "texto", "mensaje"),
    *("contenido", "frase", "mensagem", "conteudo", "conteúdo", "fala", "testo", "messaggio", "contenuto", "battuta"),
    *("bericht", "tekst", "wiadomość", "treść", "сообщение", "текст", "mesaj", "pesan", "メッセージ", "発言", "本文"),
    *("内容", "消息", "메시지", "내용", "発話", "発話内容", "セリフ", "wypowiedź", "wypowiedz", "реплика", "linetext"),
    *("replik", "repliikka", "zpráva", "zprava", "form", "originalform"),
)
TURN_LISTS = (
    *("messages", "conversations", "conversation", "turns", "dialog", "dialogue", "utterances", "chatmessages"),
    *("items", "contents", "messagelist", "chat", "chatlog", "chathistory", "exchanges", "lines", "log", "thread"),
    *("talk", "transcript", "dialogues", "msgs", "data", "text", "internal", "chosen", "history", "content"),
    *("dialogueturns", "dialogturns", "turnlist", "posts", "comments", "replies", "script"),
)
ID_KEYS = (
    *("dialogueid", "dialogid", "dialogueuid", "conversationid", "conversationuuid", "convid", "conversationuid"),
    *("messagetreeid", "chatid", "chatsession", "threadid", "sessionid", "sceneid", "callid", "ticketid", "caseid"),
    *("linkid", "channelid", "roomid", "dialogue", "dialog", "dialognumber", "dialogueno", "conversation"),
    *("conversationno", "conversationnumber", "session", "thread", "channel", "room", "chat", "chatname", "topic"),
    *("dialogid", "gespräch", "gespraech", "gesprächid", "unterhaltung", "dialogo", "diálogo", "conversacion"),
    *("conversación", "conversa", "conversazione", "gesprek", "диалог", "会話", "对话", "대화", "id"),
    *("会話id", "nrrozmowy", "rozmowa", "idrozmowy", "gesprächsid", "conversanr", "nconversacion"),
)
CHAT_IDS = frozenset(  # ids of whole chats, which pauses divide into dialogues
    ("chatsession", "chatid", "chatname", "chat", "channelid", "channel", "roomid", "room")
)
SCENE_KEYS = ("season", "seasonno", "seasonid", "episode", "episodeno", "episodeid", "episodenumber")
SCENE_PARTS = ("scene", "sceneno", "scenenumber", "szene", "scène", "escena", "cena")
ORDER_KEYS = (
    *("turnid", "turnidx", "turnindex", "turnno", "turnnumber", "turn", "utteranceid", "utteranceidx", "utteranceno"),
    *("utteranceindex", "messageindex", "messageno", "index", "idx", "sequence", "seq", "order", "position", "step"),
    *("lineno", "linenumber", "lineid", "round", "no", "number", "nr"),
    *("順番", "kolejność", "поряд", "ordre", "orden", "ordem", "reihenfolge"),
)
TIME_KEYS = (
    *("timestampms", "timestamp", "datetime", "createdat", "createtime", "createddate", "createdutc", "created"),
    *("originalarrivaltime", "sentat", "senddate", "sent", "messagedate", "datesent", "ts", "date", "time"),
    *("datum", "zeit", "uhrzeit", "zeitstempel", "fecha", "hora", "heure", "ora", "dataora", "дата", "время", "日時"),
    *("时间", "날짜", "originserverts", "servertimestamp", "senttime", "sendtime", "timesent", "msgtime"),
    *("messagetime", "createdtime", "posttime", "postedat", "epoch", "unixtime", "unixtimestamp", "dateutc", "timeutc"),
    *("godzina", "czas", "tid", "klockslag", "čas", "um"),
)
PARENT_KEYS = (
    *("parentid", "parent", "parentuuid", "parentmessageid", "replytoid", "replyto", "inreplyto", "inreplytoid"),
    *("inresponsetotweetid", "inresponsetoid", "inresponseto"),
)
MESSAGE_IDS = ("messageid", "id", "uuid", "tweetid", "msgid", "commentid", "postid")
WEIGHT_KEYS = ("weight", "lossweight", "train", "trainable")  # 0 or false: this message is context

PAIRS = (
    *(("prompt", "completion"), ("question", "answer"), ("prompt", "response"), ("question", "response")),
    *(("query", "response"), ("user", "assistant"), ("human", "assistant"), ("prompt", "chosen"), ("query", "answer")),
    *(("user", "bot"), ("human", "bot"), ("human", "ai"), ("user", "ai"), ("user", "model"), ("human", "gpt")),
    *(("user", "chatbot"), ("input", "output"), ("prompt", "answer"), ("prompt", "output"), ("prompt", "reply")),
    *(("message", "reply"), ("message", "response"), ("utterance", "response"), ("context", "response")),
    *(("question", "reply"), ("q", "a"), ("questions", "answers"), ("usermessage", "botmessage")),
    *(("patient", "doctor"), ("usermessage", "assistantmessage"), ("userinput", "botresponse")),
    ("userquery", "botresponse"),
    *(("customer", "agent"), ("customer", "support"), ("input", "response"), ("input", "target"), ("frage", "antwort")),
    *(("pregunta", "respuesta"), ("pergunta", "resposta"), ("domanda", "risposta"), ("вопрос", "ответ")),
    *(("vraag", "antwoord"), ("提问", "回答"), ("質問", "回答"), ("问题", "回答"), ("질문", "답변"), ("soru", "cevap")),
    *(("questiontext", "answertext"), ("questionbody", "answerbody"), ("asked", "answered"), ("request", "response")),
)
INPUTS, OUTPUTS = ("input", "context"), ("output", "response", "completion", "answer")
INSTRUCTIONS = ("instruction", "instructions")
SYSTEM_PROMPTS = ("system", "systemprompt", "systeminstruction", "systemmessage")

# Keys that hold no conversation: labels, ids, summaries, other answers.
OTHER_KEYS = frozenset(
    re.findall(
        r"\S+",
        """place setting scene location before after headline teaser story dish cooking recipe ingredients
steps wrong right incorrect deutsch englisch französisch spanisch italienisch latein last firstname
lastname surname town street zip postcode theme font login welcome goodbye claim evidence verdict
plot film movie director song artist lyric album genre year publisher isbn term definition meaning
synonym antonym singular plural problem solution cause effect id uuid guid key label labels title
summary summaries abstract article document documents passage paragraph url uri link source sources
target date time category categories tag tags type kind class score scores rating rank lang language
languages locale topics subject email phone address city country age gender sex emotion emotions
mood sentiment intent intents act acts domain domains service services split set difficulty level
metadata meta info description notes note version status state file filename path image images audio
video attachment attachments reaction reactions persona personas personality profile background
knowledge facts fact candidates negatives rejected distractor distractors explanation rationale
reasoning thought thoughts hypothesis premise sentence sentences word words token tokens translation
english german french spanish italian hindi en de fr es it pt nl ru zh ja ko ar hi original
paraphrase review reviews product price quantity count total amount currency first second third
entity entities ner pos tags1 setup punchline joke poem lyrics code sql schema table chapter verse
book author1 name1 username channel guild server participants members created updated deleted flag
flags model model1 temperature config settings options choices choice correct answerkey hint hints
keywords""",
    )
)


@lru_cache(maxsize=4096)
def plain(key: str) -> str:
    """Normalise a key or column name for comparison: "Sender Name", "sender_name" and "senderName" become equal."""
    return re.sub(r"[\W_]+", "", key).casefold()


# Matches the words inside a key: message_text, senderName.
PIECES = re.compile(r"[^\W\d_][^\W\d_A-Z]*")
CORE_SPEAKER = frozenset(("speaker", "sender", "author", "character", "nick", "nickname", "person", "actor"))
CORE_TEXT = frozenset(("text", "message", "msg", "utterance", "content", "body", "line", "transcript"))
NO_TURN = frozenset(
    (
        *("id", "ids", "type", "time", "date", "list", "count", "number", "length", "len", "url", "lang", "language"),
        *("index", "at", "color", "icon", "image"),
    )
)


class TurnKeys(NamedTuple):
    """The keys of a turn by content; if several match, the likeliest comes first."""

    speaker: tuple[str, ...]
    text: tuple[str, ...]
    role: str | None
    identity: tuple[str, ...]  # keys that together identify the dialogue
    order: str | None
    time: tuple[str, ...]  # a date and a time of day may be two columns
    parent: str | None
    message: str | None  # the turn's id, which other turns have as their `parent`
    weight: str | None
    guessed: bool  # whether the text's key only resembles a known one


Columns = tuple[tuple[str, str], ...]  # (content, key) pairs of `--columns`


@lru_cache(maxsize=4096)
def turn_keys(keys: tuple[str, ...], columns: Columns = ()) -> TurnKeys:
    """Return the meaning of a turn's keys, from the user's `columns` or else from their names."""
    asked = dict(columns)
    found: dict[str, str] = {}
    for key in keys:
        found.setdefault(plain(key), key)

    def known(words: Iterable[str], what: str = "") -> tuple[str, ...]:
        chosen = asked.get(what)
        if chosen is not None:
            return (chosen,) if chosen in keys else ()
        return tuple(found[word] for word in words if word in found and found[word] not in asked.values())

    def alike(core: frozenset[str]) -> tuple[str, ...]:
        """Return the only multi-word key that contains a known word: `line_text`, `msgSender`."""
        pieces = {key: {piece.casefold() for piece in PIECES.findall(key)} for key in keys if key not in asked.values()}
        one = [key for key, words in pieces.items() if words & core and len(words & (CORE_SPEAKER | CORE_TEXT)) == 1]
        one = [key for key in one if not pieces[key] & NO_TURN]
        return tuple(one) if len(one) == 1 else ()

    speaker = known(SPEAKER_KEYS, "speaker") or ("speaker" not in asked and alike(CORE_SPEAKER)) or ()
    text = known(TEXT_KEYS, "text") or ("text" not in asked and alike(CORE_TEXT)) or ()
    scenes = () if "dialogue" in asked else (*known(SCENE_KEYS), *known(SCENE_PARTS))
    taken = {*speaker[:1], *text[:1]}
    ids = tuple(key for key in known(ID_KEYS, "dialogue") if key not in taken)[:1]
    identity = ids if ids and (plain(ids[0]) != "id" or not scenes) else scenes
    times = known(TIME_KEYS, "time")
    split = tuple(found[word] for word in ("date", "time") if found.get(word) in times)
    return TurnKeys(
        speaker=tuple(key for key in speaker if key not in text[:1]) or speaker,
        text=text,
        role=next(iter(known(("role",))), None) if "speaker" not in asked else None,
        identity=tuple(key for key in identity if key not in taken),
        order=next((key for key in known(ORDER_KEYS) if key not in taken), None),
        time=split if len(split) == 2 else tuple(key for key in times if key not in taken)[:1],
        parent=next(iter(known(PARENT_KEYS)), None),
        message=next(iter(known(MESSAGE_IDS)), None),
        weight=next(iter(known(WEIGHT_KEYS)), None),
        guessed=bool(text) and not known(TEXT_KEYS, "text"),
    )


def find_key(values: dict[str, Any], words: Iterable[str]) -> str | None:
    """Return the key for the first of `words` with a non-empty value, or else for the first that occurs."""
    found = {plain(key): key for key in reversed(values)} if values else {}
    there = [found[word] for word in words if word in found]
    return next((key for key in there if not is_nothing(values[key])), there[0] if there else None)


def is_nothing(value: Any) -> bool:
    return value is None or value == [] or (isinstance(value, str) and not value.strip())


def has_sentences(texts: Iterable[str]) -> bool:
    """Whether one of the texts ends like a sentence, unlike labels, names and numbers."""
    return any(text.rstrip(" \"'”’»)*_").endswith((".", "!", "?", "…", "。", "！", "？")) for text in texts)
