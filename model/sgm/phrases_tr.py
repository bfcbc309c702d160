"""Turkish: words that fill slots, templates of messages between bars, and facts with questions about them."""

from model.sgm.turkish import words

FILLERS = {
    "name": words(
        "Ayşe, Mehmet, Zeynep, Elif, Burak, Deniz, Emre, Fatma, Selin, Can, Ali, Derya, Hakan, Leyla, Murat, "
        "Nazlı, Oğuz, Pınar, Kerem, Gül, Ömer, İpek, Yusuf, Şule, Çağla, Barış, Irmak, Umut, Ece, Tolga, Sibel, "
        "Cem, Volkan, Ebru, Onur, Melis, Kaan, Esra, Serkan, Gamze"
    ),
    "rel": words(
        "kız kardeşim, abim, annem, babam, eşim, kızım, oğlum, amcam, teyzem, patronum, en yakın arkadaşım, "
        "kuzenim, dedem"
    ),
    "city": words("Ankara, İzmir, İstanbul, Bursa, Adana, Trabzon, Muş, Edirne, Berlin, Eskişehir, Iğdır, Ordu"),
    "country": words("Norveç, Japonya, İtalya, Kanada, Brezilya, Hindistan, Almanya, Portekiz"),
    "food": words(
        "pizza, mercimek çorbası, çilek, makarna, zeytin, fıstık, ıspanak, baklava, balık, mantı, karpuz"
    ),
    "drink": words("sade kahve, yeşil çay, portakal suyu, ayran, süt, limonata, şalgam"),
    "color": words("kırmızı, mavi, yeşil, sarı, mor, siyah, turuncu, beyaz, turkuaz, gri"),
    "animal": words("köpek, kedi, papağan, tavşan, hamster, kaplumbağa, muhabbet kuşu"),
    "job": words("hemşire, öğretmen, yazılım mühendisi, marangoz, avukat, pilot, aşçı, muhasebeci, mimar"),
    "company": words("Arçelik, belediye, devlet hastanesi, üniversite, banka, küçük bir girişim, Siemens"),
    "hobby": words("satranç, yürüyüş, resim, bisiklet, yüzme, bahçe işleri, gitar, fotoğraf, örgü"),
    "thing": words("araba, bilgisayar, telefon, şemsiye, cüzdan, pasaport, kamera, mont, bavul, gözlük"),
    "date": words("3 Mayıs, 14 Şubat, 21 Haziran, 30 Ağustos, 9 Kasım, 1 Ocak, 17 Mart"),
    "day": words("pazartesi, salı, perşembe, cuma, cumartesi, pazar"),
    "when": words("dün, geçen hafta, geçen yaz, bu sabah, salı günü, iki gün önce, dün gece, martta"),
    "topic": words(
        "sonbahar, yalnız bir robot, deniz, dostluk, kayıp bir anahtar, ay, cesur bir fare, zaman yolculuğu, "
        "yağmur"
    ),
    "science": words("yerçekimi, fotosentez, kara delikler, enflasyon, DNA, gelgit, aşılar, elektrik, depremler"),
    "famous": words(
        "Einstein, Napolyon, Marie Curie, Mozart, Atatürk, Shakespeare, Kleopatra, Newton, Fatih Sultan Mehmet"
    ),
    "lang": words("İspanyolca, Almanca, İngilizce, Fransızca, Japonca, İtalyanca"),
    "order": words(
        "yaz, açıkla, özetle, çevir, listele, karşılaştır, hesapla, öner, tanımla, sırala, düzelt, betimle, "
        "uydur, çiz, anlat, kısalt, incele, kontrol et, sınıflandır, geliştir, oluştur, çöz, tasarla, say, "
        "tamamla, planla, göster, bul, hazırla"
    ),
    "work": words(
        "bir şiir, bir rapor, bir mektup, bir konuşma, bir tablo, bir bilmece, bir cümle, metni, bu makaleyi, "
        "bir tarif, bir eleştiri, bir plan, kodu, bir deneme, sayıları, bir başlık, bir menü, bir ders, "
        "kelimeleri, bir diyalog, denklemi, bir slogan"
    ),
    "subject": words(
        "roma imparatorluğu, yanardağlar, kalp, elektrikli arabalar, caz, olimpiyatlar, dinozorlar, "
        "güneş panelleri, borsa, arılar, buzullar, satranç, insan beyni, futbol, kahve, köprüler, demokrasi, "
        "balinalar, bilgisayarlar, pirinç, internet, Mars"
    ),
    "algo": words(
        "listeyi ters çeviren, sayıları sıralayan, JSON okuyan, kelimeleri sayan, asal sayıları bulan, "
        "CSV dosyası okuyan"
    ),
    "task": words(
        "yazıcıyı düzeltmek, modemi yeniden başlatmak, ekmek yapmak, fotoğrafları yedeklemek, siteyi yayınlamak, "
        "filtreyi temizlemek, gitarı akort etmek"
    ),
    "object": words("yazıcıyı, modemi, ekmeği, fotoğrafları, siteyi, filtreyi, gitarı"),
    "trick": words(
        "düğmeye on saniye bas, soğuk su kullan, önce sürücüyü güncelle, betiği iki kez çalıştır, soldan başla, "
        "bir tutam tuz ekle, fişi bir dakika çek"
    ),
}  # fmt: skip
# Nouns that a person has one of, with the slot that its value is drawn from. The last word takes the possessive, or
# `{}` stands where it goes.
ATTRIBUTES = (
    "en sevdi{} renk=color, en sevdi{} yemek=food, en sevdi{} içecek=drink, en sevdi{} hayvan=animal, "
    "doğum gün=date, telefon numara=number, kapı şifre=number, wifi parola=secret, ayakkabı numara=number, "
    "memleket=city, dişçi=name, doktor=name, köpek=pet, kedi=pet, meslek=job, işveren=company, "
    "uğurlu sayı=number, ana dil=lang, ev sahip=name, en yakın arkadaş=name, göbek ad=name, hobi=hobby, "
    "dolap numara=number, pasaport numara=number, e-posta adres=secret, danışman=name, uçuş numara=number, "
    "sigorta numara=number, komşu=name, anneanne=name, takma ad=pet, düğün tarih=date, bisiklet=color, "
    "araba=color, kapı=color, spor salon=company, banka=company, en sevdi{} şehir=city, tatil yer=country, "
    "randevu=date, sınav tarih=date, tansiyon=number, daire numara=number, öğrenci numara=number, "
    "mont beden=number, kahvaltı=food, öğretmen=name, avukat=name, saç=color, kullanıcı ad=secret, alarm=time, "
    "tren=time, yatma zaman=time, park yer=number, çay sipariş=drink, çocukluk hayal=job, mezuniyet yıl=year, "
    "kilit şifre=number, takım=company, piyano hoca=name"
)
# What/verb stem, from which all forms are made.
EPISODES = (
    "dişçiye/git, çatıyı/tamir et, bahçeye ağaç/dik, on kişiye yemek/pişir, ev sahibiyle/konuş, camı/kır, "
    "bir cüzdan/bul, Roma'ya/uç, bir ödül/kazan, muhtara mektup/yaz, mutfağı/boya, saçımı/kes, kan/bağışla, "
    "gölde/yüz, arabanın yağını/değiştir, sözleşmeyi/imzala, partiden erken/ayrıl, yeni gözlük/ısmarla, "
    "müzeyi/gez, koroya/katıl, aboneliği/iptal et, bisikleti/onar, treni/kaçır, pasta/yap, tesisatçıyı/çağır, "
    "merdivenden/düş, trafik cezası/ye, kitabı kütüphaneye/ver, komşuyla/tartış, çadırda/uyu, faturayı/gönder, "
    "perdeleri/yıka, bir yavru kedi/al, pasaportumu/yenile"
)
SURNAMES = words(
    "Yılmaz, Kaya, Demir, Şahin, Çelik, Yıldız, Öztürk, Aydın, Özdemir, Arslan, Doğan, Kılıç, Aslan, "
    "Çetin, Kara, Koç, Kurt, Özkan, Şimşek, Polat, Korkmaz, Çakır, Erdoğan, Güneş, Aksoy, Bulut, Tekin, "
    "Keskin, Avcı, Turan, Güler, Acar, Taş, Ünal, Işık, Bozkurt, Sarı, Duman, Uçar, Ateş, Çoban, Tunç, "
    "Sönmez, Yavuz, Ekinci, Bayrak, Soylu, Toprak"
)
OWNERS = words("kız kardeşim, abim, annem, babam, eşim, kızım, patronum, komşum")
# Templates between bars; the order matters only in that every fifth is held out.
STORE = {
    "fact": """
Adım {name}. | Benim adım {name}. | {city:de} yaşıyorum. | {age} yaşındayım. | Kız kardeşimin adı {name}. |
{company} için çalışıyorum, mesleğim {job}. | Doğum günüm {date}. | {year} yılında doğdum. |
{pet} adında bir {animal} besliyorum. | Arabam {color}. | {food} bana dokunuyor, alerjim var. |
{year} yılında {city:e} taşındım. | {rel} {company} için çalışıyor. | {name} benim kuzenim olur. |
{name:in} doğum günü {date}. | {n} kuzenim var. | Bana {name} diyebilirsin. | Herkes bana {name} der. |
{country:de} büyüdüm. | Telefon numaramın sonu {n}{n}. | Kapı şifrem {n}{n}{n}{n}. |
Bilgisayarımın şifresi {pet}{year}. | {name} iki çocuğuyla {city:de} oturuyor. | Ayakkabı numaram 42. |
{color} bir araba kullanıyorum. | {year} yılında evlendik. | {rel} aslen {city} doğumlu. |
Üniversitede {science} okuyorum. | Doktorumun adı {name}. | Köpeğimiz {n} yaşında. |
{lang} ve biraz {lang} biliyorum. | Ben {job} olarak çalışıyorum. | Evlilik yıldönümümüz {date}. |
Pasaportumu ikinci çekmecede saklıyorum. | Uçağım {day} günü {time:de} kalkıyor. | {name:in} {food} alerjisi var. |
{year} yılından beri {city:de} yaşıyoruz. | Aslen {city:den} geliyorum. | Yeni adresim Gül Sokak {n}, {city}. |
Aldığım {thing} {color} renkte. | Her gün saat {time:de} ilacımı alıyorum. | {rel} {age} yaşına girdi. |
{name} ile evliyim. | {company} işinden ayrıldım. | {name} ile aynı takımdayız. | Kan grubum A pozitif. |
{food:i} severim. | {hobby} yapmayı çok seviyorum. | {food:den} nefret ederim. | En sevdiğim renk {color}. |
En sevdiğim yemek {food}. | {drink} yerine {drink} tercih ederim. | {food} yemem. |
{food:e} hiç dayanamıyorum, midem kaldırmıyor. | {name} {drink} sever. | {day} günleri {hobby} ile uğraşırım. |
Sabahları {drink} içerim. | Genellikle {drink} içiyorum. | {hobby} hayranıyım. | Kahveme asla şeker koymam. |
{rel} {food} tercih eder. | Bu aralar {hobby} ile ilgileniyorum. | Bana hep {lang} cevap vermeni tercih ederim. |
Ben vejetaryenim. | {animal:den} korkarım. | Benim için en güzel yemek {food}. | Hobim {hobby}. | {mine} {value}. |
{mine} artık {value}. | {value} benim için önemli, çünkü {mine} bu. | {mine}: {value} | {mine} olarak {value} yaz. |
Bu arada {mine} {value} oldu. | {mine} {value} olacak. | {mine} eskiden {n} idi, şimdi {value}. |
Bilmeni isterim ki {mine} {value}. | {mine} değişti, {value} oldu. | {mine} her zaman {value} oldu. |
{mine} aslında {value}. | {mine} {value}, {n} değil. | {value}, {mine} budur. | {my} olarak {value} seçtim. |
{n} tane {animal} var evimde. | {color} bir {thing} sahibiyim. | {lang} öğreniyorum. |
Dizim sakat, {hobby} yapamıyorum. | {rel} {food} yemez. | {n} yıldır {job} olarak çalışıyorum. |
{city:den} geldim, oralıyım. | Eşimle {n} çocuğumuz var. | {food} yiyince hasta oluyorum. | Sadece {drink} içerim. |
Her sabah {time:de} kalkarım. | Akşamları saat {time:de} yatarım. | Her {day} {hobby} yapıyorum. | Gözlük takıyorum. |
Solağım. | {age} kiloyum. | Alkol kullanmıyorum. | {food} hiç sevmem. | Eskiden {country:de} yaşardım. |
Eskiden {job} idim. | Annemle babam {city:de} oturuyor. | Oğlum {city:de} okula gidiyor. |
{name} benimle {company} için çalışıyor. | {name:in} iki tane kedisi var. | {name:in} eşi {job}. |
{name} {color} bir araba sürüyor. | {name} {food:den} nefret eder. | {country:de} bir evimiz var. |
Komşularımızın adı {name} ve {name}. | Ailemde {n} kişi var. | {n} kardeşin en büyüğüyüm. |
{name} ile bir grupta çalıyorum. | İngilizce öğretmenim {name} idi. | {year} yılında mezun oldum. |
{color} bir araba için para biriktiriyorum. | Hayalim {job} olmak. | Çay da olur ama {drink} daha çok hoşuma gider. |
Annem {age} yaşında. | Yedek anahtar saksının altında duruyor. | {city} doğumluyum. |
Ben {n} numaralı dairede oturuyorum. | Evimiz {city:de}. | Boyum 1.{age}. | Sigarayı {year} yılında bıraktım. |
{lang} konuşabiliyorum. | Müziksiz çalışamam. | Sessiz yerleri daha çok severim. | {hobby} bana iyi geliyor. |
{name} benim en iyi dostumdur. | Emekliyim. | Öğrenciyim, {science} bölümündeyim.
""",
    "episode": """
{when} {name} ile tanıştım. | {when} {rel} ile {city:e} gittik. | {when} cüzdanımı kaybettim. |
{when} {name} ile akşam yemeği yedik. | Bugün öğlen {food} yedim. | {rel} {when} beni ziyaret etti. |
{when} yeni bir {thing} aldım. | {when} {topic} hakkında bir kitap bitirdim. | {name} beni {when} aradı. |
{when} kolumu kırdım. | Saat {time:de} {name} ile toplantım vardı. | {when} {topic} üzerine bir film izledik. |
{hobby} dersine {when} başladım. | {when} ehliyet sınavını geçtim. | {when} kedimiz evden kaçtı. |
{name} ile {when} {hobby} yaptık. | {color} arabamı {when} sattım. | {when} {city:de} {name:i} gördüm. |
Telefonum {when} çalındı. | Bugün {n} kilometre koştum. | {country:den} yeni döndüm. |
{day} günü saat {time:de} {name} ile buluşacağım. | Kirayı {when} ödedim. | {when} yeni eve taşındık. |
{when} şemsiyemi {name:e} verdim. | {when} {did}. | {did}, {when} oldu. | {when} {name} ile birlikte {did}. |
Sonunda {when} {did}. | {name} ile {did}. | {did} ve sonra eve döndüm. | İlk defa {did}. |
Tahmin et ne oldu, {when} {did}! | {day} günü {to} zorundayım. | {day} günü {rel} ile {to} istiyoruz, planımız bu. |
{to} {when} {n} saatimi aldı. | {rel} ile {when} {did}. | Ben {when} {did}. | {when} biraz yorgundum ama {did}. |
{city:de} {did}. | {when} {did}, aklında olsun. | {when}, yani geçenlerde, {did}. | {when} {did} ya. |
{when} {did}, çok iyi oldu. | {did}, hem de {when}. | {country:e} {n} kere gittim. | Sınavımı az önce bitirdim. |
{when} kanepede uyuyakaldım. | {when} telefonum bozuldu. | Kedimiz {when} {n} yavru doğurdu. |
{name} bana {when} bir {thing} verdi. | {name} {when} evlendi. | Doktor {when} dinlenmemi söyledi. |
{when} {name} ile sinemadaydım. | {when} hastaydım. | {when} hiç uyuyamadım. | Şemsiyemi otobüste unuttum. |
{date} tarihinde maraton koştum. | Az önce {name} ile konuştum, selamı var. | Bugün işe geç kaldım. |
{day} günü {city:e} gidiyorum. | Yarın {name} ile buluşuyoruz. | Haftaya {city:de} olacağım.
""",
    "skill": """
{task} için {trick}. | {task} istiyorsan {trick}. | {task} için püf noktası şu: {trick}. |
{task} için benim yöntemim: {trick}. | {task} gerektiğinde önce {trick}. | {task} nasıl olur buldum: {trick}. |
Şöyle yapıyoruz: {task} için {trick}, sonra bekle. | {task} istediğinde mutlaka {trick}. |
{task} için en iyi yol: {trick}. | {task} için şunu öğrendim: {trick}. | {task} için işe yarayan şey: {trick}. |
{task} öncesinde {trick}. | Ben {task} için hep şunu yaparım: {trick}. | {object} düzeltmeyi başardım, {trick} yeter. |
{task} için denediğim ve çalışan tek yol: {trick}. | Not: {task} için {trick}. |
{task} adımları: 1. {trick} 2. bekle 3. kontrol et. | Bizde {task} böyle olur: {trick}. |
{trick}, {task} böyle kolaylaşıyor. | Unutmadan: {task} için {trick}. | Önce {trick}, {task} için bu gerekiyor. |
{task} lazım olunca hep {trick}. | Kuralım şu: {task} için {trick}. | {trick}, yoksa {task} mümkün değil. |
Annemden öğrendim: {task} için {trick}. | Kolayı var: {task} için {trick}.
""",
}
RETRIEVE = """
Adım ne? | Benim adım neydi? | Nerede yaşıyorum? | Kaç yaşındayım? | Kız kardeşimin adı ne? | Nerede çalışıyorum? |
Doğum günüm ne zaman? | Hangi yıl doğdum? | Köpeğimin adı ne? | Arabamın rengi ne? | Neye alerjim var? |
{city:e} ne zaman taşındım? | {rel} nerede çalışıyor? | {name} kim? | {name:in} doğum günü ne zaman? |
Kaç kuzenim var? | Kapı şifrem neydi? | Benim hakkımda ne biliyorsun? | {name} hakkında ne biliyorsun? |
Adımı hatırlıyor musun? | Nerede oturduğumu hatırlıyor musun? | Telefon numaramı hatırlatır mısın? |
Annemin adını söyle. | Bilgisayarımın şifresi ne? | Ayakkabı numaram kaçtı? | Hangi arabayı kullanıyorum? |
Kapı şifremi unuttum, neydi? | Pasaportumu nereye koyduğumu hatırlamıyorum. | Sana {name} hakkında ne anlatmıştım? |
{rel} için ne demiştim? | Nerede çalıştığımı söylemiş miydim? | {name:in} adresinden bahsetmiş miydim? |
Nerede büyüdüm? | En sevdiğim renk hangisi? | En çok hangi yemeği severim? | Ne içmeyi severim? | {food} sever miyim? |
{name} {drink} sever mi? | Hobilerim neler? | {rel} neyi tercih eder? | Öğlen ne yemiştim? |
{name:i} en son ne zaman gördüm? | {when} kiminle tanıştım? | {when} nereye gittim? | Cüzdanımı ne zaman kaybettim? |
{when} hangi filmi izledik? | Şemsiyem nerede? | {name} ile randevum ne zaman? | Uçağım saat kaçta? |
İlacımı saat kaçta almam gerekiyor? | {object} geçen sefer nasıl düzeltmiştim? |
Biz genelde {task} için ne yapıyorduk? | {task} için püf noktam neydi? | {object} nasıl hallettiğimi hatırlat. |
Kedimin ismini söyler misin? | {rel} ne zaman doğmuştu? | Arabam {color} mi {color} mi? | Evli miyim? |
Evcil hayvanım var mı? | {name} kaç yaşında? | Köpeğimiz kaç yaşında? | Hangi dilleri biliyorum? | {name} nereli? |
{name} ne iş yapıyor? | Doktorum kim? | {when} beni kim aramıştı? | Hangi şehirde yaşadığımı söylemiştim? |
{rel} vardı ya, adı neydi? | Adresime bak. | Ne iş yaptığımı hâlâ biliyor musun? |
Telefonumun neye benzediğini söyler misin? | Yıldönümümüz ne zamandı? | İşim hakkında şimdiye kadar sana ne anlattım? |
Pasaportumu hangi çekmecede saklıyorum? | {when} kiminle yemek yedim? | adım? | {name:in} telefon numarası? |
{object} nasıl yapıyorduk ya? | {name} ile ne zaman buluşacağım? | En sevdiğim yemeği biliyor musun? | {mine} ne? |
{mine} neydi? | {mine} nedir? | {mine:i} hatırlıyor musun? | {mine:i} biliyor musun? | {mine:i} söyler misin? |
{mine:i} söyle. | {mine:i} unuttum. | {mine:i} hatırlat. | {mine} ne demiştim? | Sana {mine:i} söylemiş miydim? |
Bana {mine} lazım. | {mine}? | {mine} hangisiydi? | {mine} {value} mi? | {mine:i} hatırlamıyorum. |
{mine:i} bana hatırlatır mısın? | {mine} neydi ya? | Lütfen {mine:i} ver. | {mine:e} bir bakar mısın? |
Acaba {mine} ne? | {mine} olarak ne not etmiştin? | Ne zaman {did}? | {did} mı? | {when} ne yaptım? | Kiminle {did}? |
{that} hatırlıyor musun? | Sana {that} anlatmış mıydım? | Ne zaman {had}? | {had}, ne zamandı? |
{had}, hatırlıyor musun? | Kaç gün önce {did}? | {when} ne olmuştu? | Nerede {had}? | {day} günü planım ne? |
{name} ile {when} ne yaptık? | {name} ile ne zaman {did}? | Hangi gün {had}? | {that} sana söyledim mi? |
Ne zaman {to} zorundaydım? | Kaç yıldır {job} olarak çalışıyorum? | Ben nereliyim? | Kaç çocuğumuz var? |
Neden {food} yiyemiyorum? | Sabah saat kaçta kalkıyorum? | Saat kaçta yatıyorum? | {day} günleri ne yapıyorum? |
Gözlük takıyor muyum? | Kaç kiloyum? | Eskiden nerede yaşıyordum? | Annemle babam nerede oturuyor? |
Oğlum hangi okula gidiyor? | {company} için benimle kim çalışıyor? | {name:in} kedisi var mı? |
{name} ne araba sürüyor? | {name} hangi yemekten nefret eder? | Evimiz hangi ülkede? | Komşularımızın adı neydi? |
Ailemde kaç kişi var? | Kiminle müzik yapıyorum? | Hangi yıl mezun oldum? | Ne için para biriktiriyorum? |
Ne olmak istiyorum? | Hangisini daha çok severim, {drink} mı {drink} mı? | Annem kaç yaşında? | Yedek anahtar nerede? |
{country:e} kaç kere gittim? | Telefonuma ne oldu? | {name} bana ne vermişti? | Doktor bana ne söylemişti? |
{when} hasta mıydım? | Sinemaya kiminle gitmiştim? | Şemsiyemi nerede unuttum? | {date} tarihinde ne yapıyordum? |
Bana annemden bahset, ne biliyorsun? | {name} hakkında bildiğin her şeyi anlat. | {when} ne konuşmuştuk? |
Ablam hakkında sana söylediğim şey neydi? | {name} ile daha önce tanışmış mıydık? |
Arkadaşlarımdan hangisi {food} sever? | Şemsiyem {color} miydi? | {mine} neydi acaba? |
{mine:i} hatırlamama yardım et. | Kaç kere {did}? | Neden {did}? | Boyum kaç? | Hangi bölümde okuyorum? |
Sigarayı ne zaman bıraktım? | Yarın kiminle buluşuyorum? | Haftaya nerede olacağım? | Benim en iyi dostum kim? |
Ben kimim? | Bugün öğleden sonra ne işim vardı?
"""
NEITHER = """
{topic} hakkında bir şiir yaz. | Bana {topic} üzerine kısa bir hikâye yaz. | {topic} ile ilgili bir fıkra anlat. |
{topic} hakkında bir şarkı bestele. | {food} satan bir dükkâna isim bul. | {topic} üzerine bir haiku yaz. |
İçinde bir {animal} ve bir kral olan bir masal uydur. | {city:de} gün batımını betimle. |
Patronuma izin isteyen bir e-posta yaz. | Ayda yaşayan bir {job} olduğunu hayal et. | Parti için beş fikir bul. |
{company} için bir slogan yaz. | Şu hikâyeyi devam ettir: Bir varmış bir yokmuş. |
{famous} ile bir {animal} arasında geçen bir diyalog yaz. | Harflerle bir kedi çiz. | Merhaba! | Selam, nasılsın? |
Günaydın! | Nasıl gidiyor? | Çok teşekkürler! | Teşekkür ederim, çok yardımcı oldun. | İyi geceler. | Görüşürüz. |
Ne haber? | Tamam. | Bu harika! | Haha, çok komik. | Çok zekisin. | Tanıştığıma memnun oldum. | Sen robot musun? |
Seni kim yaptı? | Neler yapabilirsin? | Anladım. | Güzel, devam et. | Pardon, anlamadım. | Hayır, bu yanlış. |
Evet lütfen. | Başka bir şeyden konuşalım. | {country:in} başkenti neresi? | {famous} kimdir? |
{science} nasıl çalışır? | {famous} ne zaman doğdu? | {science} ile {science} arasındaki fark nedir? |
Gökyüzü neden mavi? | {city:de} kaç kişi yaşıyor? | {science} konusunu bir çocuğa anlat. | {science} ne demek? |
{city} ile {city} arası kaç kilometre? | {country:in} en büyük şehri hangisi? | {n} çarpı {age} kaç eder? |
{food} {lang} nasıl denir? | Hamlet'i kim yazdı? | {city:de} hava nasıl? | {food} sağlıklı mı? |
Savaş hangi yıl bitti? | Eyfel Kulesi ne kadar yüksek? | Bana {food} tarifi ver. |
{country} gezisi için en iyi zaman ne? | {city:in} tarihini anlat. | Köpekler yüzebilir mi? |
{science} kavramını tanımla. | {code} ile {algo} bir fonksiyon yaz. | {code} dilinde liste nasıl sıralanır? |
Şu kodu düzelt: for i in range({n}) print(i) | Bu hata ne anlama geliyor: index out of range? |
Bu {code} kodunu bana açıkla. | {algo} bir fonksiyon için birim testi yaz. |
Bu {code} programını {code} diline çevir. | Linux'ta {code} nasıl kurulur? | {code} dilinde işaretçi nedir? |
def f(x): return x + {n} | Tarihler için bir düzenli ifade yaz. | Bu {code} kodunu hızlandır. |
{code} ile dosya nasıl açılır göster. | Bu cümleyi {lang} diline çevir. | "Günaydın" sözünü {lang} diline çevir. |
Aşağıdaki metni özetle. | Bu paragrafı daha basit sözlerle yaz. | Bu cümlenin dil bilgisini düzelt. |
{hobby} için üç fayda say. | {hobby} için {n} ipucu ver. | {city} ile {city:i} karşılaştır. | Daha kısa yaz. |
Tekrar dene lütfen. | Bunu tek cümleyle söyle. | 1'den {age:e} kadar say. | {n} mili kilometreye çevir. |
Şu kelimeleri sırala: {food}, {drink}, {thing}. | {city:de} bir hafta sonu planla. |
{science} hakkında iyi bir kitap öner. | Korsan gibi konuş. | Sadece evet ya da hayır diye cevap ver. |
{n}x + {age} = {year} denklemini çöz. | Su 100 derecede kaynar. | {city} güzel bir şehirdir. |
Dünya güneşin etrafında döner. | {famous} uzun zaman önce öldü. | {science} önemli bir konudur. |
Balina bir memelidir. | Adam kapıyı açtı ve karanlık odaya girdi. |
Bir zamanlar bir {animal} besleyen yaşlı bir kral varmış. | Yağmur yağıyor. | {science} hakkında ne düşünüyorsun? |
{food} sever misin? | Senin adın ne? | Sen nerede yaşıyorsun? | Kaç yaşındasın? | En sevdiğin renk ne? |
Bana yardım eder misin? | Benim için bir mektup yazar mısın? | {topic} hakkında bir şiir yazmanı istiyorum. |
{algo} bir {code} betiği lazım. | {science} nasıl çalışır bilmek istiyorum. |
Kedilerin neden çok uyuduğunu merak ediyorum. | Bir sorum var. | Bilmiyorum. | Sanırım bu doğru. | Sana katılıyorum. |
{yours} ne? | {yours} var mı? | Peki senin {yours} {value} mi? | {noun} kelimesi ne demek? |
{my} hakkında bir şiir yaz. | Yeni bir {noun} seçmeme yardım et. | İnsanlar neden {noun} ister? |
{noun} için öneriler ver. | {code} ile {noun} alanı olan bir sınıf yaz. | {code} dilinde {noun} nasıl saklanır? |
İnsan nasıl {to} ister? | {to} için ne giymeli? | {to} konusunda tavsiye ver. | Hiç {you} mı? |
İnsanlar neden {to} ister? | {to} zor mu? | {famous} {year} yılında savaştı. | Hikâyede bir {job} ormana gitti. |
{do}. | Bana {do}. | {to} hakkında bir hikâye yaz. | Sen ne zaman {you}? | Merhaba, günün nasıl geçiyor? | Tünaydın! |
Hoşça kal! | İyi akşamlar. | Tekrar hoş geldin. | Nasılsın, iyi misin? | Süper. | Harikasın, sağ ol. | Aferin! |
Tamamdır, teşekkürler. | Boş ver. | Sorun değil. | Yok, sağ ol. | Evet. | Hayır. | Doğru. | Hmm, ilginç. |
Gerçekten mi? | Vay, inanılmaz. | Sıkıldım. | Hahaha. | Öyle demek istemedim. | Rica ederim. | İyi günler! |
Başlayalım. | Lütfen devam et. | Dur. | Bir dakika bekle. | Orada mısın? | Ne demek istiyorsun? | Tekrar eder misin? |
Neden? | Bana ilginç bir şey anlat. | Hadi oyun oynayalım. | Bana bir soru sor. | Bir {job} gibi davran. |
{science} için eş anlamlı bir kelime ver. | Daha basit kelimeler kullan. | Bunu tabloya dönüştür. |
Son cümleyi başka sözlerle söyle. | Bu metni {n} kelimeye indir. | Bu makaleyi oku ve ana fikrini söyle. |
Yazım hatalarını kontrol et. | {drink} ile {drink} karışırsa ne olur? | {country} mi daha büyük, {country} mi? |
{city:den} {city:e} uçak kaç saat sürer? | Bir {thing} ne kadar? | {city} nerede? | {science} kavramını kim buldu? |
{country:in} cumhurbaşkanı kim? | {city} ne zaman kuruldu? | Örümceğin kaç bacağı var? | Hayatın anlamı ne? |
{science} tehlikeli mi? | Bir {animal} ne yer? | {food} nasıl yapılır? | {science} nasıl oluşur? | {work} {order}. |
{subject} hakkında {work} {order}. | Lütfen benim için {work} {order}. | Bana {work} {order}. |
{subject} konulu {work} {order} lütfen. | {work} {order} ve kısa tut. | {n} satırda {work} {order}. |
Şimdi {work} {order}. | {subject} konusunu tek paragrafta {order}. | Önce {work} {order}, sonra {work} {order}. |
Görevin şu: {work} {order}. | {lang} dilinde {work} {order}. | Haydi {work} {order}. |
{work} {order}, ama {subject} olmasın. | {subject} hakkında {work} gerekiyor. | {subject} nedir? |
{subject} ne işe yarar? | {subject} nasıl başladı? | {subject} ne zaman ortaya çıktı? | {subject:i} kim icat etti? |
{subject} neden önemli? | {subject} niçin bu kadar popüler? | Kaç çeşit {subject} var? | {subject} nerede bulunur? |
{subject} pahalı mı? | {subject} gerçekten var mı? | {subject} önemli mi? | {subject} değiştirilemez mi? |
{subject:den} ne öğrenebiliriz? | {subject} üzerine hangi kitaplar iyi? | {subject} için artılar ve eksiler neler? |
{subject} hakkında bilgi ver. | Bana {subject} hakkında bir şey anlat. | {subject} nasıl çalışıyor, merak ediyorum. |
{subject} konusunu öğret. | {subject} için bir örnek ver. | {subject} dünyayı değiştirdi. |
{subject} en ilginç konulardan biridir. | İnsanlar uzun zamandır {subject} üzerine çalışıyor. |
{subject} hakkında çok kitap yazıldı. | Kadın {thing:e} baktı ve hiçbir şey söylemedi. |
Akşama kadar {city:de} yürüdüler. | Yaşlı {job} gülümsedi ve kapıyı kapattı. | Kendini nasıl tanımlarsın? |
Duyguların var mı? | {work} yapabilir misin? | Eğitiminden bir şey hatırlıyor musun? | İyi uyudun mu? | Sen kimsin? |
Nerelisin? | Ne yemeyi seversin? | Burada olmana sevindim. | İyiyim, teşekkürler, ya sen? | Bunu iyi yaptın. |
Yanılıyorsun. | Çok komiksin. | Buna bayıldım! | Bundan nefret ettim. | Cevabını beğendim. | Aman Tanrım! |
İnanamıyorum. | Diğerini kastettim. | Anlamıyorum. | Mükemmel, istediğim buydu. | Biraz daha ayrıntı lütfen. |
Peki sonra? | Başka bir şey? | Ben de. | Fena değil. | Bir tane daha. | Benimle {lang} konuş. | {work} {order} misin? |
Bu metinde kaç kelime var? | Benim için {subject} hakkında {work} {order}. | {n} ile {age} sayısını topla. |
Hangi gezegen en büyük?
"""
# What makes a statement uncertain.
HEDGES = (
    "sanırım {}|galiba {}|yanılmıyorsam {}|emin değilim ama {}|sanıyorum {}|{} herhalde|belki {}|muhtemelen {}|"
    "tahminimce {}|{}, emin değilim|hatırladığım kadarıyla {}|{} gibi bir şey|{} olabilir|"
    "tam bilmiyorum ama {}|{} galiba|{} sanırım|herhalde {}|yanlış hatırlamıyorsam {}|büyük ihtimalle {}|"
    "{} belki"
)
OPENINGS = "Merhaba, |Selam! |Bu arada |Ya |Şey, |Bak, |Bilgin olsun, |Tamam, |Bir şey daha: |Dinle, "
CLOSINGS = " teşekkürler| :)| lütfen| ya| sağ ol| 😀"
# Facts whose questions use other words or forms: of the speaker and of another, each a statement, one that is held
# out, and questions, of which the last is held out.
REWORDED = """
{city:de} yaşıyorum.| Yıllardır {city:de} yaşarım.| Nerede yaşıyorum?| Hangi şehirde yaşıyorum?|
  Yaşadığım şehir neresi?
{who} {city:de} yaşıyor.| {who} yıllardır {city:de} yaşar.| {who} nerede yaşıyor?| {who} hangi şehirde yaşıyor?|
  {who:in} yaşadığı şehir neresi?
Arabam {color}.| {color} bir arabam var.| Arabam ne renk?| Arabamın rengi neydi?| Arabamın rengi ne?
{who:in} arabası {color}.| {who:in} {color} bir arabası var.| {who:in} arabası ne renk?|
  {who:in} arabasının rengi neydi?| {who:in} arabasının rengi ne?
{job} olarak çalışıyorum.| Benim işim {job} olarak çalışmak.| Ne olarak çalışıyorum?| Hangi işte çalışıyorum?|
  Çalıştığım iş ne?
{who} {job} olarak çalışıyor.| {who:in} işi {job} olarak çalışmak.| {who} ne olarak çalışıyor?|
  {who} hangi işte çalışıyor?| {who:in} çalıştığı iş ne?
{year} yılında doğdum.| Doğduğumda yıl {year} idi.| Hangi yıl doğdum?| Kaç yılında doğmuştum?| Doğduğum yıl ne?
{who} {year} yılında doğdu.| {who} doğduğunda yıl {year} idi.| {who} hangi yıl doğdu?| {who} kaç yılında doğmuştu?|
  {who:in} doğduğu yıl ne?
{food:e} alerjim var.| Alerjim {food:e} karşı.| Neye alerjim var?| Alerjim neye karşı?|
  Hangi yemek bana alerji yapıyor?
{who:in} {food:e} alerjisi var.| {who:in} alerjisi {food:e} karşı.| {who:in} neye alerjisi var?|
  {who:in} alerjisi neye karşı?| Hangi yemek {who:e} alerji yapıyor?
{hobby} yapmayı seviyorum.| {hobby} yapmayı çok severim.| Ne yapmayı seviyorum?| Neyi yapmayı severim?|
  Yapmayı sevdiğim uğraş ne?
{who} {hobby} yapmayı seviyor.| {who} {hobby} yapmayı çok sever.| {who} ne yapmayı seviyor?|
  {who} neyi yapmayı sever?| {who:in} yapmayı sevdiği uğraş ne?
{name} ile evliyim.| {name} ile evli biriyim.| Kiminle evliyim?| Ben kiminle evliydim?| Evli olduğum kişi kim?
{who} {name} ile evli.| {who}, {name} ile evli biri.| {who} kiminle evli?| {who} kiminle evliydi?|
  {who:in} evli olduğu kişi kim?
Evde {lang} konuşuyorum.| Biz evde hep {lang} konuşuruz.| Evde ne konuşuyorum?| Evde hangi dili konuşurum?|
  Evimizde konuştuğum dil hangisi?
{who} evde {lang} konuşuyor.| {who} evde hep {lang} konuşur.| {who} evde ne konuşuyor?|
  {who} evde hangi dili konuşur?| {who:in} evinde konuştuğu dil hangisi?
{food:den} nefret ederim.| {food:den} hep nefret etmişimdir.| Hangi yemekten nefret ederim?|
  Nelerden nefret ediyorum?| Nefret ettiğim yemek ne?
{who} {food:den} nefret eder.| {who} {food:den} hep nefret etmiştir.| {who} hangi yemekten nefret eder?|
  {who} nelerden nefret ediyor?| {who:in} nefret ettiği yemek ne?
{pet} adında bir papağanım var.| Benim papağanımın adı {pet}.| Papağanımın adı ne?| Papağanımın adını söyle.|
  Papağanıma ne ad vermiştim?
{who:in} {pet} adında bir papağanı var.| {who:in} papağanının adı {pet}.| {who:in} papağanının adı ne?|
  {who:in} papağanının adını söyle.| {who} papağanına ne ad vermişti?
{country:de} büyüdüm.| Çocukken {country:de} büyümüştüm.| Nerede büyüdüm?| Hangi ülkede büyüdüm?|
  Büyüdüğüm ülke hangisi?
{who} {country:de} büyüdü.| {who} çocukken {country:de} büyümüştü.| {who} nerede büyüdü?| {who} hangi ülkede büyüdü?|
  {who:in} büyüdüğü ülke hangisi?
Üniversitede {science} okudum.| Üniversitede {science} bölümünde okumuştum.| Üniversitede ne okudum?|
  Hangi bölümü okumuştum?| Okuduğum bölüm neydi?
{who} üniversitede {science} okudu.| {who} üniversitede {science} bölümünde okumuştu.| {who} üniversitede ne okudu?|
  {who} hangi bölümü okumuştu?| {who:in} okuduğu bölüm neydi?
İlacımı saat {time:de} alıyorum.| İlacımı her gün {time:de} içerim.| İlacımı saat kaçta alıyorum?|
  İlacımı ne zaman alıyorum?| İlaç saatim kaç?
{who} ilacını saat {time:de} alıyor.| {who} ilacını her gün {time:de} içer.| {who} ilacını saat kaçta alıyor?|
  {who} ilacını ne zaman alıyor?| {who:in} ilaç saati kaç?
Yedek anahtarı kapının yanında saklıyorum.| Yedek anahtarım kapının yanında duruyor.|
  Yedek anahtarı nerede saklıyorum?| Yedek anahtarım nerede?| Anahtarın yedeğini nereye saklamıştım?
{who} yedek anahtarı kapının yanında saklıyor.| {who:in} yedek anahtarı kapının yanında duruyor.|
  {who} yedek anahtarı nerede saklıyor?| {who:in} yedek anahtarı nerede?| {who} anahtarın yedeğini nereye saklamıştı?
"""
