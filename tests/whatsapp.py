"""Large WhatsApp exports, as written by phones of five countries, and the dialogues that a reader must find."""

from datetime import datetime, timedelta
from pathlib import Path
from random import Random
from typing import NamedTuple

MARK = "\u200e"  # iOS writes this before all text that no person typed
PAUSE = timedelta(hours=8)


class Country(NamedTuple):
    """The texts that phones in a country write: timestamps, WhatsApp's words, names and sentences."""

    android: str  # the timestamp
    ios: str
    names: tuple[str, ...]
    sentences: tuple[str, ...]
    media: str  # in <...> on Android
    omitted: tuple[str, ...]  # on iOS
    attached: str
    ios_attached: str
    deleted: tuple[str, ...]
    missed: tuple[str, ...]
    poll: tuple[str, str]
    edited: str
    encrypted: str
    events: tuple[str, ...]  # with one name in each


COUNTRIES = {
    "German": Country(
        android="{dd}.{mm}.{yy}, {hh}:{min} - ",
        ios="[{dd}.{mm}.{yy}, {hh}:{min}:{ss}] ",
        names=('Nora "Nono" Berg', "Timo 🚲", "Oma Käthe", "+49 170 0000000"),
        sentences=(
            "Kommst du heute noch vorbei?",
            "Eins noch: Bring bitte Bargeld mit.",
            "Der Zug hat schon wieder {n} Minuten Verspätung 🙄",
            "Die Karten stehen hier: https://example.org/karten?von=a&tag={n}",
            "Ich habe das Video gesehen, das ist ja großartig!",
            "Diese Nachricht wurde gelöscht? Was stand denn drin?",
            "Na gut.",
            "😂😂😂",
            "Um {n}:15 Uhr am Brunnen – nicht früher.",
            "Einkaufen:\n- Brot\n- {n} Äpfel\n- Milch",
            "Ich habe dich nicht hinzugefügt, das war Oma.",
            "Weißt du, wo der Schlüssel liegt? Im Flur ist er nicht.",
        ),
        media="Medien ausgeschlossen",
        omitted=("Bild weggelassen", "Video weggelassen", "Audio weggelassen", "Sticker weggelassen"),
        attached="Datei angehängt",
        ios_attached="Anhang",
        deleted=("Diese Nachricht wurde gelöscht.", "Du hast diese Nachricht gelöscht."),
        missed=("Verpasster Sprachanruf", "Verpasster Videoanruf"),
        poll=("UMFRAGE", "OPTION"),
        edited="Diese Nachricht wurde bearbeitet.",
        encrypted="Nachrichten und Anrufe sind Ende-zu-Ende-verschlüsselt. Tippe, um mehr zu erfahren.",
        events=(
            "{} hat den Betreff zu „Reise: Rom“ geändert",
            "{} hat Cem hinzugefügt",
            "{} hat das Gruppenbild geändert",
            "{} hat die Gruppe verlassen",
        ),
    ),
    "English": Country(
        android="{m}/{d}/{yy}, {h12}:{min}\u202f{PM} - ",
        ios="[{m}/{d}/{yy}, {h12}:{min}:{ss}\u202f{PM}] ",
        names=('Nora "Nono" Berg', "Timo 🚲", "Dr. O’Hara (work)", "+1 555 010 0000"),
        sentences=(
            "Are you coming over tonight?",
            "One thing: bring cash.",
            "The train is {n} minutes late again 🙄",
            "Tickets are here: https://example.org/tickets?from=a&day={n}",
            "I saw the video, it is great!",
            "This message was deleted? What did it say?",
            "Fine.",
            "😂😂😂",
            "Meet at {n}:15 by the fountain - not earlier.",
            "Shopping:\n- bread\n- {n} apples\n- milk",
            "I never added you to that list, and I left early.",
            "Do you know where the key is? It isn't in the hall.",
        ),
        media="Media omitted",
        omitted=("image omitted", "video omitted", "audio omitted", "sticker omitted", "Contact card omitted"),
        attached="file attached",
        ios_attached="attached",
        deleted=("This message was deleted", "You deleted this message"),
        missed=("Missed voice call", "Missed group video call"),
        poll=("POLL", "OPTION"),
        edited="This message was edited",
        encrypted="Messages and calls are end-to-end encrypted. Tap to learn more.",
        events=(
            '{} changed the subject to "Trip: Rome"',
            "{} added Cem",
            "{} changed this group's icon",
            "{} left",
        ),
    ),
    "Spanish": Country(
        android="{d}/{m}/{yy}, {hh}:{min} - ",
        ios="[{d}/{m}/{yy}, {hh}:{min}:{ss}] ",
        names=('Lucía "Lu" Peña', "Íñigo 🎸", "Mamá", "+34 600 000 000"),
        sentences=(
            "¿Vienes esta noche?",
            "Una cosa: trae efectivo.",
            "El tren llega otra vez {n} minutos tarde 🙄",
            "Las entradas están aquí: https://example.org/entradas?desde=a&dia={n}",
            "He visto el vídeo, ¡es genial!",
            "¿Eliminaste este mensaje? ¿Qué decía?",
            "Vale.",
            "😂😂😂",
            "A las {n}:15 en la fuente, no antes.",
            "Compra:\n- pan\n- {n} manzanas\n- leche",
            "Yo no te añadí, fue mamá.",
            "¿Sabes dónde está la llave? En la entrada no está.",
        ),
        media="Multimedia omitido",
        omitted=("imagen omitida", "Video omitido", "audio omitido", "sticker omitido"),
        attached="archivo adjunto",
        ios_attached="adjunto",
        deleted=("Se eliminó este mensaje.", "Eliminaste este mensaje."),
        missed=("Llamada perdida", "Videollamada perdida"),
        poll=("ENCUESTA", "OPCIÓN"),
        edited="Se editó este mensaje.",
        encrypted="Los mensajes y las llamadas están cifrados de extremo a extremo. Toca para más.",
        events=(
            '{} cambió el asunto a "Viaje: Roma"',
            "{} añadió a Cem",
            "{} cambió el ícono de este grupo",
            "{} salió del grupo",
        ),
    ),
    "Hindi": Country(
        android="{dd}/{mm}/{yy}, {h12}:{min} {pm} - ",
        ios="[{dd}/{mm}/{yy}, {h12}:{min}:{ss} {PM}] ",
        names=('प्रिया "पिंकी" शर्मा', "Rahul 🏏", "माँ", "+91 90000 00000"),
        sentences=(
            "आज शाम को आओगे?",
            "एक बात: पैसे साथ लाना।",
            "ट्रेन फिर {n} मिनट लेट है 🙄",
            "टिकट यहाँ हैं: https://example.org/ticket?se=a&din={n}",
            "मैंने वीडियो देखा, बहुत अच्छा है!",
            "यह मैसेज किसने हटा दिया?",
            "ठीक है।",
            "😂😂😂",
            "{n}:15 बजे फव्वारे के पास मिलते हैं।",
            "बाज़ार से:\n- रोटी\n- {n} सेब\n- दूध",
            "Yaar kal milte hain, pakka?",
            "चाबी कहाँ है? यहाँ तो नहीं है।",
        ),
        media="Media omitted",
        omitted=("image omitted", "फ़ोटो हटाई गई", "वीडियो छोड़ा गया", "स्टिकर छोड़ा गया"),
        attached="file attached",
        ios_attached="अटैच किया गया",
        deleted=("यह मैसेज हटा दिया गया", "आपने यह मैसेज डिलीट किया"),
        missed=("मिस्ड वॉइस कॉल", "मिस्ड वीडियो कॉल"),
        poll=("पोल", "विकल्प"),
        edited="यह मैसेज एडिट किया गया",
        encrypted="मैसेज और कॉल एंड-टू-एंड एन्क्रिप्टेड हैं। इस चैट के बाहर कोई भी इन्हें पढ़ या सुन नहीं सकता।",
        events=(
            '{} ने विषय बदलकर "यात्रा: रोम" कर दिया',
            "{} ने ग्रुप आइकन बदला",
            "{} ग्रुप से निकल गए",
        ),
    ),
    "Japanese": Country(
        android="{yyyy}/{mm}/{dd} {hh}:{min} - ",
        ios="[{yyyy}/{mm}/{dd} {h}:{min}:{ss}] ",
        names=("花子🌸", "太郎", '田中 "タナ" 一郎', "+81 90-0000-0000"),
        sentences=(
            "今夜来る？",
            "ひとつだけ: 現金を持ってきて。",
            "電車がまた{n}分遅れてる🙄",
            "切符はこちら: https://example.org/kippu?kara=a&hi={n}",
            "動画見たよ、すごくいいね！",
            "このメッセージは削除されましたって何？",
            "了解。",
            "😂😂😂",
            "{n}時15分に噴水の前で。",
            "買い物：\n・パン\n・りんご{n}個\n・牛乳",
            "写真を送ってください。",
            "鍵はどこ？玄関にはないよ。",
        ),
        media="メディアなし",
        omitted=("画像は含まれていません", "ビデオは含まれていません", "スタンプは含まれていません"),
        attached="添付ファイル",
        ios_attached="添付ファイル",
        deleted=("このメッセージは削除されました。", "メッセージを削除しました。"),
        missed=("音声通話不在着信", "ビデオ通話不在着信"),
        poll=("投票", "オプション"),
        edited="このメッセージは編集されました",
        encrypted="メッセージと通話はエンドツーエンド暗号化されています。",
        events=(
            "{}がグループ名を「旅行: ローマ」に変更しました",
            "{}がグループのアイコンを変更しました",
            "{}が退出しました",
        ),
    ),
}


class Counts(NamedTuple):
    """The lines of an export that are not turns: notices, which have a name, and lines without one."""

    notices: int
    system_lines: int


def write_chat(path: Path, language: str, messages: int, seed: int) -> tuple[list[list[tuple[str, str]]], Counts]:
    """Write an export of `messages` texts and notices, from an iPhone if `seed` is odd, else from Android.

    Returns the dialogues that a reader must find, as lists of (name, text). They are cut at pauses of eight hours;
    consecutive messages of one person form one turn, separated by line feeds. On iOS, every line has a name, at least
    that of the group, so every line that is not a text counts as a notice.
    """
    chat = Chat(COUNTRIES[language], bool(seed % 2), Random(seed))
    chat.tell(chat.country.encrypted)
    while messages > 0:
        length = chat.random.randint(8, 60)
        length = messages if messages - length < 4 else length
        chat.talk(length)
        messages -= length
    path.write_bytes("".join(chat.lines).encode())
    return chat.dialogues, Counts(chat.notices, chat.system_lines)


class Chat:
    """An export that grows message by message, each later than the one before."""

    def __init__(self, country: Country, ios: bool, random: Random) -> None:
        self.country, self.ios, self.random = country, ios, random
        self.time = datetime(2023, 1, 20, 19, 30)  # a day above 12, which can't be a month, fixes the order
        self.lines: list[str] = []
        self.dialogues: list[list[tuple[str, str]]] = []
        self.notices = self.system_lines = self.files = 0

    def write(self, rest: str, marked: bool = False) -> None:
        """Write a line with a timestamp; on iOS, U+200E precedes it if the program wrote the message."""
        stamp = stamp_of(self.time, self.country.ios if self.ios else self.country.android)
        self.lines.append(f"{MARK * (marked and self.ios)}{stamp}{rest}" + ("\r\n" if self.ios else "\n"))

    def tell(self, event: str) -> None:
        """Write a line about the chat itself."""
        if self.ios:
            self.write(f"Tea & Rome: {MARK}{event}", marked=True)
            self.notices += 1
        else:
            self.write(event)
            self.system_lines += 1

    def talk(self, length: int) -> None:
        """Write a dialogue of `length` messages, which begins with texts of two people, and a pause."""
        dialogue: list[tuple[str, str]] = []
        self.dialogues.append(dialogue)
        name = self.random.choice(self.country.names)
        for number in range(length):
            self.time += timedelta(seconds=self.random.choice((5, 20, 50, 90, 400, 2400)))
            if number == 1 or self.random.random() < 0.6:
                name = self.random.choice([other for other in self.country.names if other != name])
            if number > 1 and self.random.random() < 0.12:
                self.notice(name)
            else:
                kept = self.text(name)
                if dialogue and dialogue[-1][0] == name:
                    kept = f"{dialogue.pop()[1]}\n{kept}"
                dialogue.append((name, kept))
            if self.random.random() < 0.01:
                self.tell(self.random.choice(self.country.events).format(self.random.choice(self.country.names)))
        self.time += PAUSE + timedelta(minutes=self.random.randint(1, 3000))

    def said(self, name: str) -> str:
        """A name at the beginning of a line; on iOS, people who are not in the phone's contacts have a tilde."""
        return f"~\u202f{name}: " if self.ios and name == self.country.names[1] else f"{name}: "

    def text(self, name: str) -> str:
        """Write a text with the program's markers; return it without them."""
        random, country = self.random, self.country
        kept = " ".join(random.choices(country.sentences, k=random.randint(1, 3))).format(n=random.randint(3, 900))
        written, kind = kept, random.random()
        if kind < 0.04:
            written = f"{kept} {MARK * self.ios}<{country.edited}>"
        elif kind < 0.07:
            mentioned = random.choice(country.names)
            kept, written = f"@{mentioned} {kept}", f"@\u2068{mentioned}\u2069 {kept}"
        elif kind < 0.09:
            written = f"{kept} {MARK}{self.file()}" if self.ios else f"{self.file()}\n{kept}"
        self.write(self.said(name) + written)
        return kept

    def notice(self, name: str) -> None:
        """Write a notice from the program under a person's name."""
        random, country = self.random, self.country
        title, option = country.poll
        poll = f"{title}:\n{random.choice('ABCD')}?\n{option}: 1 (2 ✓)\n{option}: 2 (0 ✓)"
        others = (*country.deleted, *country.missed, poll, self.file())
        media = random.choice(country.omitted) if self.ios else f"<{country.media}>"
        said = random.choice(others) if random.random() < 0.5 else media
        self.write(f"{self.said(name)}{MARK * self.ios}{said}", marked=True)
        self.notices += 1

    def file(self) -> str:
        """The line of the next photo."""
        self.files += 1
        if self.ios:
            return f"<{self.country.ios_attached}: {self.files:08}-PHOTO-{self.time:%Y-%m-%d-%H-%M-%S}.jpg>"
        return f"IMG-{self.time:%Y%m%d}-WA{self.files % 10_000:04}.jpg ({self.country.attached})"


def stamp_of(time: datetime, form: str) -> str:
    """A time in the format of a country's phones."""
    return form.format(
        d=time.day,
        dd=f"{time.day:02}",
        m=time.month,
        mm=f"{time.month:02}",
        yy=f"{time.year % 100:02}",
        yyyy=time.year,
        h=time.hour,
        hh=f"{time.hour:02}",
        h12=time.hour % 12 or 12,
        min=f"{time.minute:02}",
        ss=f"{time.second:02}",
        PM="AM" if time.hour < 12 else "PM",
        pm="am" if time.hour < 12 else "pm",
    )
