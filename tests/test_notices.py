"""The notices of chat programs are recognised, and nothing that people write is taken for one."""

import re
import time
import unicodedata

import pytest

from dialogues.layouts import phrases, system_phrases
from dialogues.layouts.notices import LONGEST, is_notice, is_system_line, strip_marks
from whatsapp import COUNTRIES, Counts, write_chat

# Program and language → whole messages. On iOS, U+200E marks the program's own words.
NOTICES = {
    "WhatsApp, English": [
        "<Media omitted>",
        "\u200eimage omitted",
        "image omitted",
        "\u200eContact card omitted",
        "\u200e<attached: 00000012-PHOTO-2024-02-01-20-00-15.jpg>",
        "<attached: 00000012-PHOTO-2024-02-01-20-00-15.jpg>",
        "\u200eReport 2.pdf • \u200e3 pages \u200edocument omitted",
        "Report.pdf • \u200e1 page \u200e<attached: 00000007-Report.pdf>",
        "IMG-20240201-WA0001.jpg (file attached)",
        "\u200eAnna.vcf (file attached)",
        "<Media omitted>\n4Bit Adder.mod",
        "DOC-20240201-WA0003.pdf (file attached)\nReport March.pdf",
        "This message was deleted",
        "This message was deleted.",
        "\u200eThis message was deleted.",
        "You deleted this message",
        "This message was deleted by admin Nora Berg.",
        "Missed voice call",
        "Missed group video call",
        "Missed voice call at 10:15 PM",
        "\u200eMissed video call, \u200eTap to call back",
        "Voice call, 3 min",
        "Video call, 1 hr 5 min",
        "Voice call, No answer",
        "Voice call, Answered on other device",
        "Live location shared",
        "location: https://maps.google.com/?q=51.5,-0.12",
        "The Anchor (34 Park Street, London): https://foursquare.com/v/4ac518cd",
        "POLL:\nTea?\nOPTION: yes (2 votes)\nOPTION: no (0 votes)",
        "Waiting for this message. This may take a while.",
        "You received a view once photo. For added privacy, you can only open it on your phone.",
        "null",
        "<This message was edited>",
        "Report.pdf • 3 pages",
        "Report.pdf (2.3 MB)",
    ],
    "WhatsApp, German": [
        "<Medien ausgeschlossen>",
        "\u200eBild weggelassen",
        "Kontaktkarte ausgelassen",
        "\u200e<Anhang: 00000003-AUDIO-2024-02-01.opus>",
        "IMG-20240201-WA0001.jpg (Datei angehängt)",
        "Diese Nachricht wurde gelöscht.",
        "Du hast diese Nachricht gelöscht",
        "Diese Nachricht wurde von Admin Nora Berg gelöscht.",
        "Verpasster Sprachanruf",
        "Verpasster Gruppen-Videoanruf",
        "Verpasster Sprachanruf um 22:15",
        "Videoanruf, 12 Min.",
        "Sprachanruf, Keine Antwort",
        "Live-Standort wird geteilt",
        "Standort: https://maps.google.com/?q=52.5,13.4",
        "UMFRAGE:\nTee?\nOPTION: ja (2 Stimmen)",
        "Warte auf diese Nachricht. Dies kann einen Moment dauern.",
    ],
    "WhatsApp, French": [
        "<Médias omis>",
        "image absente",
        "IMG-20240201-WA0001.jpg (fichier joint)",
        "Ce message a été supprimé",
        "Vous avez supprimé ce message",
        "Appel vocal manqué",
        "Appel vidéo manqué",
        "SONDAGE :\nThé ?\nOPTION : oui (1 vote)",
        "En attente de ce message. Ceci peut prendre du temps.",
    ],
    "WhatsApp, Spanish": [
        "<Multimedia omitido>",
        "imagen omitida",
        "IMG-20240201-WA0001.jpg (archivo adjunto)",
        "Se eliminó este mensaje.",
        "Eliminaste este mensaje.",
        "Llamada perdida",
        "Videollamada perdida",
        "Videollamada, 5 min",
        "ENCUESTA:\n¿Té?\nOPCIÓN: sí (2 votos)",
        "ubicación: https://maps.google.com/?q=40.4,-3.7",
        "Esperando este mensaje. Esto puede tomar tiempo.",
    ],
    "WhatsApp, Portuguese": [
        "<Mídia oculta>",
        "<Arquivo de mídia oculto>",
        "<Ficheiro não revelado>",
        "imagem ocultada",
        "imagem não revelada",
        "IMG-20240201-WA0001.jpg (arquivo anexado)",
        "IMG-20240201-WA0001.jpg (ficheiro anexado)",
        "Mensagem apagada",
        "Essa mensagem foi apagada.",
        "Você apagou esta mensagem",
        "Apagou esta mensagem",
        "Chamada de voz perdida",
        "Chamada de vídeo perdida",
        "ENQUETE:\nChá?\nOPÇÃO: sim (2 votos)",
        "Aguardando mensagem. Essa ação pode levar alguns instantes.",
    ],
    "WhatsApp, Italian": [
        "<Media omessi>",
        "immagine omessa",
        "DOC-1.pdf (file allegato)",
        "Questo messaggio è stato eliminato",
        "Hai eliminato questo messaggio",
        "Chiamata vocale persa",
        "Videochiamata persa",
        "SONDAGGIO:\nTè?\nOPZIONE: sì (2 voti)",
        "In attesa del messaggio. Potrebbe richiedere un po' di tempo.",
    ],
    "WhatsApp, Dutch": [
        "<Media weggelaten>",
        "afbeelding weggelaten",
        "IMG-20240201-WA0001.jpg (bestand bijgevoegd)",
        "Dit bericht is verwijderd",
        "U hebt dit bericht verwijderd",
        "Gemist spraakgesprek",
        "Gemiste video-oproep",
    ],
    "WhatsApp, Polish": [
        "<Pominięto multimedia>",
        "‹Pominięto multimedia>",
        "obraz pominięty",
        "IMG-20240201-WA0001.jpg (plik załączony)",
        "IMG-20240201-WA0001.jpg (załączony plik)",
        "Ta wiadomość została usunięta",
        "Usunąłeś(-ęłaś) tę wiadomość",
        "Nieodebrane połączenie głosowe",
        "ANKIETA:\nHerbata?\nOPCJA: tak (2 głosy)",
    ],
    "WhatsApp, Russian": [
        "<Без медиафайлов>",
        "изображение отсутствует",
        "IMG-20240201-WA0001.jpg (файл добавлен)",
        "Данное сообщение удалено",
        "Вы удалили данное сообщение",
        "Вы удалили это сообщение.",
        "Пропущенный аудиозвонок",
        "Аудиозвонок, 3 мин.",
        "Видеозвонок, Нет ответа",
        "местоположение: https://maps.google.com/?q=55.7,37.6",
        "ОПРОС:\nЧай?\nВАРИАНТ: да (2 голоса)",
        "Ожидание сообщения. Это может занять некоторое время.",
    ],
    "WhatsApp, Ukrainian": [
        "<Медіа пропущено>",
        "зображення відсутнє",
        "IMG-20240201-WA0001.jpg (файл додано)",
        "Це повідомлення було видалено",
        "Ви видалили це повідомлення.",
        "Пропущений відеодзвінок",
    ],
    "WhatsApp, Turkish": [
        "<Medya dahil edilmedi>",
        "görüntü dahil edilmedi",
        "IMG-20240201-WA0001.jpg (dosya ekli)",
        "Bu mesaj silindi",
        "Bu mesajı sildiniz",
        "Cevapsız sesli arama",
        "ANKET:\nÇay?\nSEÇENEK: evet (2 oy)",
    ],
    "WhatsApp, Indonesian": [
        "<Media tidak disertakan>",
        "gambar tidak disertakan",
        "IMG-20240201-WA0001.jpg (file terlampir)",
        "Pesan ini dihapus",
        "Anda menghapus pesan ini",
        "Panggilan suara tak terjawab",
    ],
    "WhatsApp, Hindi": [
        "<मीडिया के बिना>",
        "फ़ोटो हटाई गई",
        "यह मैसेज हटा दिया गया",
        "यह मैसेज डिलीट कर दिया गया है",
        "आपने यह मैसेज डिलीट किया",
        "मिस्ड वॉइस कॉल",
        "पोल:\nचाय?\nविकल्प: हाँ (2 वोट)",
    ],
    "WhatsApp, Arabic": [
        "<تم استبعاد الوسائط>",
        "لم يتم إدراج الصورة",
        "IMG-20240201-WA0001.jpg (الملف مرفق)",
        "تم حذف هذه الرسالة",
        "\u200fتم حذف هذه الرسالة.",
        "مكالمة صوتية فائتة",
    ],
    "WhatsApp, Hebrew": [
        "<המדיה לא נכללה>",
        "התמונה הושמטה",
        "IMG-20240201-WA0001.jpg (קובץ מצורף)",
        "הודעה זו נמחקה",
        "מחקת הודעה זו",
        "שיחה קולית שלא נענתה",
    ],
    "WhatsApp, Japanese": [
        "<メディアなし>",
        "<メディアは含まれていません>",
        "画像は含まれていません",
        "IMG-20240201-WA0001.jpg (添付ファイル)",
        "このメッセージは削除されました。",
        "メッセージを削除しました",
        "音声通話不在着信",
        "不在着信",
    ],
    "WhatsApp, Korean": [
        "<미디어 파일을 생략한 대화내용>",
        "이미지 생략됨",
        "IMG-20240201-WA0001.jpg (파일 첨부됨)",
        "이 메시지는 삭제되었습니다",
        "부재중 전화",
    ],
    "WhatsApp, Chinese": [
        "<省略多媒体文件>",
        "<忽略多媒體檔>",
        "图片已忽略",
        "圖片已略去",
        "IMG-20240201-WA0001.jpg (文件附件)",
        "IMG-20240201-WA0001.jpg (附件檔案)",
        "此消息已删除",
        "这条消息已被删除。",
        "此訊息已刪除。",
        "您已刪除此訊息。",
        "未接语音通话",
        "未接視像通話",
    ],
    "WhatsApp, Swedish": [
        "<Media har utelämnats>",
        "bild utesluten",
        "IMG-20240201-WA0001.jpg (bifogad fil)",
        "Det här meddelandet raderades",
        "Du raderade det här meddelandet",
        "Missat röstsamtal",
    ],
    "WhatsApp, Czech": [
        "< Média vynechána >",
        "obrázek vynechán",
        "IMG-20240201-WA0001.jpg (soubor byl přiložen)",
        "Tato zpráva byla smazána",
        "Tuto zprávu jste smazal/a",
        "Zmeškaný hlasový hovor",
    ],
    "WhatsApp, Romanian": [
        "<Conținut media omis>",
        "imagine omisă",
        "IMG-20240201-WA0001.jpg (fișier atașat)",
        "Acest mesaj a fost șters",
        "Ați șters acest mesaj",
        "Apel vocal ratat",
    ],
    "WhatsApp, Greek": [
        "<Εξαίρεση πολυμέσων>",
        "εικόνα παραλείφθηκε",
        "IMG-20240201-WA0001.jpg (συνημμένο αρχείο)",
        "Αυτό το μήνυμα διαγράφηκε",
        "Διαγράψατε αυτό το μήνυμα",
        "Αναπάντητη κλήση",
    ],
    "WhatsApp, Vietnamese": [
        "<Bỏ qua tệp phương tiện>",
        "đã bỏ qua hình ảnh",
        "IMG-20240201-WA0001.jpg (tệp đính kèm)",
        "Tin nhắn này đã bị xóa",
        "Bạn đã xoá tin nhắn này",
        "Cuộc gọi nhỡ",
    ],
    "WhatsApp, Thai": [
        "<ไฟล์สื่อถูกลบ>",
        "ไม่มีรูปภาพ",
        "IMG-20240201-WA0001.jpg (ไฟล์ที่แนบ)",
        "ข้อความนี้ถูกลบแล้ว",
        "คุณลบข้อความนี้",
        "สายที่ไม่ได้รับ",
    ],
    "WhatsApp, Persian": [
        "<رسانه حذف شد>",
        "تصویر حذف شد",
        "IMG-20240201-WA0001.jpg (پیوست شد)",
        "این پیام حذف شد",
        "شما این پیام را حذف کردید.",
        "تماس صوتی پاسخ داده نشده",
    ],
    "LINE": [
        "[Photo]",
        "[Sticker]",
        "[File] plan.pdf",
        "☎ Call time 3:12",
        "☎ Missed call",
        "☎ Canceled call",
        "[写真]",
        "[スタンプ]",
        "写真",
        "スタンプ",
        "☎ 通話時間 12:03",
        "☎ 不在着信",
        "☎ 通話をキャンセルしました",
        "メッセージの送信を取り消しました",
        "[貼圖]",
        "[照片]",
        "[รูป]",
    ],
    "KakaoTalk": [
        "사진",
        "사진 3장",
        "이모티콘",
        "동영상",
        "삭제된 메시지입니다.",
        "보이스톡 해요",
        "보이스톡 3:12",
        "페이스톡 부재중",
        "파일: 계획.pdf",
        "샵검색: #날씨",
        "사진을 보냈습니다.",
    ],
    "Telegram": [
        "[ Photo ]",
        "[ Sticker ]",
        "Photo\nNot included, change data exporting settings to download.",
        "[Фото]",
    ],
    "Messenger": [
        "You sent an attachment.",
        "Nora sent a photo.",
        "Nora Berg missed a call",
        "You missed a call from Nora.",
        "Nora unsent a message",
        "You are now connected on Messenger.",
        "The video chat ended.",
        "Nora hat einen Anhang gesendet.",
    ],
    "Instagram": [
        "Liked a message",
        "Reacted 😂 to your message",
        "Reacted 😂 to your message ",
        "Nora sent an attachment.",
        "Hat mit ❤ auf deine Nachricht reagiert",
        "A réagi 😂 à votre message",
        "Reagiu com 😂 à sua mensagem",
    ],
    "Discord": ["Pinned a message.", "Started a call", "Started a call that lasted 3 minutes.", "Joined the server."],
    "Slack": ["has joined the channel", "<@U02AB> has joined the channel", "<@U02AB> has left the channel"],
    "Teams, Zoom, iMessage": [
        "This message has been deleted.",
        'Reacted to "See you at ten" with 👍',
        "Liked “See you at ten”",
        "Loved an image",
    ],
    "WeChat": ["[图片]", "[语音]", "[动画表情]", "“Nora” 撤回了一条消息"],
    "notifications": ["📷 Photo", "🎤 Voice message (0:12)", "📄 document"],
}
TALK = [
    "Video",
    "Photo",
    "GIF",
    "Sticker",
    "Image",
    "location",
    "I deleted this message yesterday because it was wrong",
    "This message was deleted by my little brother, sorry",
    "you deleted this message? why?",
    "The media omitted the best part",
    "He omitted the image",
    "image omitted from the report, please add it",
    "Missed call from 3 people",
    "I missed a call",
    "She missed your call.",
    "My mom sent a photo.",
    "He sent an attachment.",
    "They liked a message",
    "Call 10:30?",
    "Video call 18:30",
    "Voice call",
    "Waiting for this message all day!",
    "null and void",
    "<3",
    "<br>",
    "I <3 you <and> this",
    "<laughs>",
    "<https://example.org/a>",
    "a < b > c",
    "[x] done",
    "[shrugs]",
    "[微笑]",
    "I like node.js (and react)\nYou too?",
    "see the report.pdf (page 4)",
    "main.py - 3 bugs",
    "https://www.google.com/search?q=tea",
    "See you here: https://maps.google.com/?q=1,2",
    "poll: who wants tea?",
    "OPTION: none of them",
    "view once more please",
    "Started a call with the doctor, wait",
    "Pinned a message on the fridge",
    "has joined the channel before you",
    "📷 Photo of my cat",
    "📞 call me",
    "Liked it",
    "☎ 555 1234",
    "The file is attached (file attached)",
    "what does (file attached) mean?",
    "...",
    "😂",
    "@\u2068Nora Berg\u2069 ok",
    "Die Medien ausgeschlossen haben sie auch",
    "Diese Nachricht wurde gelöscht, weil sie falsch war",
    "Wer hat diese Nachricht gelöscht?",
    "Videoanruf 18:30?",
    "Bild",
    "Ich habe den Anruf verpasst",
    "Ce message a été supprimé par erreur, je le renvoie",
    "Appel manqué de ma part, désolé",
    "Eliminaste este mensaje, ¿verdad?",
    "Llamada perdida de tu madre",
    "Essa mensagem foi apagada pela minha mãe",
    "Questo messaggio è stato eliminato ieri",
    "Dit bericht is verwijderd door mij",
    "Ta wiadomość została usunięta wczoraj",
    "Почему данное сообщение удалено?",
    "Вы удалили это сообщение?",
    "Bu mesaj kim tarafından silindi",
    "Kenapa pesan ini dihapus",
    "यह मैसेज किसने हटा दिया",
    "لماذا تم حذف هذه الرسالة",
    "למה הודעה זו נמחקה",
    "写真を送って",
    "スタンプかわいい",
    "このメッセージは削除されましたか",
    "사진 보내줘",
    "이모티콘 귀여워",
    "图片发给我",
    "消息已经被我删除",
    "貼圖好可愛",
    "Tin nhắn này đã bị xóa chưa",
    "این پیام حذف شد؟",
    "",
    " \u200f",
]


@pytest.mark.parametrize("program", NOTICES)
def test_notices_are_recognised(program):
    missed = [text for text in NOTICES[program] if not is_notice(text)]
    assert not missed


@pytest.mark.parametrize("text", TALK)
def test_messages_from_people_are_not_notices(text):
    assert not is_notice(text)


def test_upper_case_and_decomposed_notices_are_recognised():
    """Accents are separate from their letters, as in Apple's file systems."""
    for texts in NOTICES.values():
        for text in texts:
            assert is_notice(unicodedata.normalize("NFD", text)), text
    assert is_notice("THIS MESSAGE WAS DELETED")


@pytest.mark.parametrize(
    ("text", "kept"),
    [
        ("Look! <This message was edited>", "Look!"),
        ("Look!\u200e<This message was edited>", "Look!"),
        ("Look!\nThere. \u200e<Diese Nachricht wurde bearbeitet.>", "Look!\nThere."),
        ("Mira <Se editó este mensaje.>", "Mira"),
        ("Regarde <Ce message a été modifié>", "Regarde"),
        ("Olha <Mensagem editada>", "Olha"),
        ("Guarda <Questo messaggio è stato modificato>", "Guarda"),
        ("Смотри <Сообщение изменено>", "Смотри"),
        ("Bak <Bu mesaj düzenlendi>", "Bak"),
        ("Lihat <Pesan ini diedit>", "Lihat"),
        ("見て <このメッセージは編集されました>", "見て"),
        ("IMG-1.jpg (file attached)\nLook!", "Look!"),
        ("\u200eIMG-20240201-WA0001.jpg (archivo adjunto)\n¡Mira!\nAquí", "¡Mira!\nAquí"),
        ("IMG-20240201-WA0001.jpg (in no known language)\nLook!", "Look!"),
        ("<Media omitted>\nLook!", "Look!"),
        ("Look! \u200eimage omitted", "Look!"),
        ("\u200eLook! \u200e<attached: 00000012-PHOTO-2024-02-01-20-00-15.jpg>", "Look!"),
        ("Look! \u200e<attached: 00000012-PHOTO.jpg> \u200e<This message was edited>", "Look!"),
        ("@\u2068Nora Berg\u2069 ok", "@Nora Berg ok"),
        ("\u200f\u202bשלום\u202c\u200e", "שלום"),
        ("\u200f שלום \u200f לך", "שלום \u200f לך"),
        ("a <b> c", "a <b> c"),
        ("He wrote <edited>", "He wrote <edited>"),
        ("I like node.js (and react)\nYou?", "I like node.js (and react)\nYou?"),
        ("This message was deleted", "This message was deleted"),
        ("<Media omitted>", ""),
        ("", ""),
    ],
)
def test_markers_are_stripped_from_texts(text, kept):
    assert strip_marks(text) == kept
    assert strip_marks(kept) == kept


@pytest.mark.parametrize(
    "text", ["IMG-1.jpg (file attached)\nLook!", "\u200eLook! \u200eimage omitted", "Ha <Mensagem editada>"]
)
def test_a_caption_is_not_a_notice(text):
    assert not is_notice(text)


SYSTEM_LINES = [
    "Messages and calls are end-to-end encrypted. No one outside of this chat can read or listen to them.",
    "\u200eMessages and calls are end-to-end encrypted.",
    "Ann added Bob",
    "Ann added Bob: the Builder",
    'Ann changed the subject to "Trip: Rome"',
    "Ann changed the subject from “Trip: Rome” to “Home”",
    'You created group "Trip: Rome"',
    "You added Cem",
    "You're now an admin",
    "Cem's security code changed. Tap to learn more.",
    "Cem’s security code changed.",
    "Cem left",
    "+49 170 0000000 left",
    "Cem joined using this group's invite link",
    "Ann changed this group's icon",
    "Ann turned on disappearing messages. New messages will disappear 24 hours after they're sent.",
    "Missed voice call",
    "Nachrichten und Anrufe sind Ende-zu-Ende-verschlüsselt.",
    "Ann hat Bob hinzugefügt",
    "Ann hat den Betreff zu „Reise: Rom“ geändert",
    "Ann hat die Gruppe „Reise“ erstellt",
    "Ann hat die Gruppe verlassen",
    "Les messages et les appels sont chiffrés de bout en bout.",
    "Ann a ajouté Bob",
    "Ann a quitté le groupe",
    "Los mensajes y las llamadas están cifrados de extremo a extremo.",
    "Ann añadió a Bob",
    'Ann cambió el asunto a "Viaje: Roma"',
    "As mensagens e as chamadas são protegidas com a criptografia de ponta a ponta.",
    "Ann adicionou Bob",
    "Ann saiu",
    "I messaggi e le chiamate sono crittografati end-to-end.",
    "Ann ha aggiunto Bob",
    "Berichten en gesprekken worden end-to-end versleuteld.",
    "Ann heeft Bob toegevoegd",
    "Wiadomości i połączenia są w pełni zaszyfrowane.",
    "Ann dodała Bob",
    "Сообщения и звонки защищены сквозным шифрованием.",
    "Ann добавила Bob",
    "Ann вышла",
    "Повідомлення й дзвінки захищено наскрізним шифруванням.",
    "Mesajlar ve aramalar uçtan uca şifrelidir.",
    "Ann gruptan ayrıldı",
    "Pesan dan panggilan terenkripsi secara end-to-end.",
    "Ann menambahkan Bob",
    "मैसेजेस और कॉल्स एंड-टू-एंड एन्क्रिप्टेड हैं.",
    "الرسائل والمكالمات مشفرة تمامًا بين الطرفين",
    "ההודעות והשיחות מוצפנות מקצה לקצה.",
    "メッセージと通話はエンドツーエンド暗号化されています。",
    "Annがグループに参加しました。",
    "메시지 및 전화는 종단간 암호화되어 안전합니다.",
    "Ann님이 들어왔습니다.",
    "Ann님이 Bob님을 초대했습니다.",
    "消息和通话都进行端到端加密。",
    "訊息和通話經端對端加密。",
    "Meddelanden och samtal är komplett krypterade.",
    "Zprávy a hovory jsou opatřeny koncovým šifrováním.",
    "Mesajele și apelurile sunt criptate integral.",
    "Τα μηνύματα και οι κλήσεις κρυπτογραφούνται πλήρως.",
    "Tin nhắn và cuộc gọi được mã hóa đầu cuối.",
    "ข้อความและการโทรได้รับการเข้ารหัสจากต้นทางถึงปลายทาง",
    "Ann has joined #tea",
    "-!- Timo [t@h] has joined #tea",
    "--- Day changed Mon Jan 01 2024",
    "--> Timo (t@h) has joined #tea",
    "<-- Timo (t@h) has quit (Ping timeout: 240 seconds)",
    "*** Timo sets mode: +o Nora",
    "* Timo (t@h) has joined #tea",
    "* Timo has quit (Quit: bye)",
    "* Joins: Timo (t@h)",
    "Timo is now known as Timo_away",
    'Timo has changed the topic to "Tea: now"',
    "Timo has signed off.",
    "Timo entered the room.",
    "Timo has joined the channel",
    "Timo joined #general",
]


@pytest.mark.parametrize("line", SYSTEM_LINES)
def test_system_lines_are_recognised(line):
    assert is_system_line(line)


@pytest.mark.parametrize(
    "line",
    [
        "",
        "Ann: Bob left",
        "Ann: I added sugar: two spoons",
        "Ann: You created a mess",
        "Ann: has joined #tea",
        "Bob: 님이 들어왔습니다",
        "I left",
        "She left",
        "They added sugar",
        "* Timo waves",
        "* Timo added sugar",
        "***",
        "---",
        "Is it still raining?",
        "Gestern hat es geregnet",
        "https://example.org/left",
    ],
)
def test_other_lines_are_not_system_lines(line):
    assert not is_system_line(line)


@pytest.mark.parametrize("language", COUNTRIES)
@pytest.mark.parametrize("seed", [0, 1])
def test_a_whole_chat_is_read(language, seed, tmp_path):
    """In exports from phones of five countries, notices and system lines are recognised, and the texts remain."""
    path = tmp_path / "chat.txt"
    dialogues, counts = write_chat(path, language, 2000, seed)
    content = path.read_bytes().decode().replace("\r\n", "\n")
    stamp = r"^\u200e?(?:\[\d+[./][^\]\n]+\] |\d+[./]\d+[./]\d+,? [^-\n]+ - )"
    rests = [rest.removesuffix("\n") for rest in re.split(stamp, content, flags=re.MULTILINE)[1:]]
    said = [rest for rest in rests if not is_system_line(rest)]
    texts = [text for text in (rest.split(": ", 1)[1] for rest in said) if not is_notice(text)]
    assert "\n".join(map(strip_marks, texts)) == "\n".join(text for dialogue in dialogues for _, text in dialogue)
    assert Counts(len(said) - len(texts), len(rests) - len(said)) == counts
    assert len(texts) + counts.notices + counts.system_lines >= 2000
    assert min(counts.notices, len(dialogues), len(texts) // 20) > 20
    assert (counts.system_lines > 5) == (seed == 0)
    again = tmp_path / "again.txt"
    assert write_chat(again, language, 2000, seed) == (dialogues, counts)
    assert again.read_bytes() == path.read_bytes()


def test_phrases_are_normalised_like_texts():
    for module in (phrases, system_phrases):
        for name, family in vars(module).items():
            if name.isupper():
                for piece in family:
                    assert piece == unicodedata.normalize("NFC", piece.lower()), piece
                    assert "" not in piece.split("|"), piece


MEGABYTE = 1_000_000
UNITS = ["a", " ", "\u200e", "\u2068", "<", ">", "<a", "(", "a.b ", "a.bc (", "\n", "\na:", "1:", "3 min ", "图片", "["]
UNITS += ["poll:\n", "option: a\n", "you ", "Ann ", "☎", "ann added ", "missed call ", "<media omitted>\n"]
UNITS += ["\u200e<attached: 1234-a.jpg>"]


@pytest.mark.parametrize("unit", UNITS)
@pytest.mark.parametrize("size", [LONGEST - 50, MEGABYTE])
def test_hostile_texts_take_linear_time(unit, size):
    text = unit * (size // len(unit))
    started = time.perf_counter()
    for ended in (
        text,
        f"<{text}>",
        f"x ({text})",
        f"{text}\u200e omitted",
        f"[photo:{text}.pdf",
        f"{text}\nOPTION: x",
    ):
        is_notice(ended)
        strip_marks(ended)
        is_system_line(ended)
    assert time.perf_counter() - started < 1
